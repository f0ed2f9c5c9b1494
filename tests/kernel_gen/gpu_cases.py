"""Shared by the GPU tests: compile a kernel for the GPU at hand, build a case, run it on poisoned memory, compare with
the reference.
"""

import functools
from dataclasses import dataclass

import pytest
import torch

from kernel_gen.compiler import load_in_process
from kernel_gen.experts import Experts
from kernel_gen.formats import check_output, expected_output, quantize
from kernel_gen.kernels import KernelSpec
from kernel_gen.runtime import Kernel
from profiles import kernels, schemes
from profiles.schemes import QuantScheme

GUARD_ROWS = 8
"""Rows of NaN before and behind the output: a store outside the tile's rows shows there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One grouped GEMM: each expert's scheme and tokens."""

    n: int
    k: int
    counts: tuple[int, ...]
    scheme_names: tuple[str, ...]
    seed: int = 0


@functools.cache
def kernel_for(config_name: str, scheme_names: tuple[str, ...], max_experts: int = 256) -> Kernel:
    """A kernel compiled in this process for the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    if config_name.startswith("wgmma") and (major, minor) != (9, 0):
        pytest.skip(f"wgmma is sm_90a's, this GPU is sm_{major}{minor}")
    spec = KernelSpec(
        config=kernels.parse(config_name),
        schemes=tuple(schemes.parse(name) for name in scheme_names),
        arch=f"sm_{major}{minor}" + ("a" if major >= 9 else ""),
        max_experts=max_experts,
    )
    return Kernel(spec, load_in_process(spec), ctas_per_sm=spec.config.min_ctas_per_sm)


def offsets_of(counts: tuple[int, ...]) -> torch.Tensor:
    """int32 [E + 1] on the GPU."""
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def poisoned(num_tokens: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole buffer, the [T, N] output inside it), all NaN."""
    whole = torch.full((num_tokens + 2 * GUARD_ROWS, n), torch.nan, dtype=torch.bfloat16, device="cuda")
    return whole, whole[GUARD_ROWS : GUARD_ROWS + num_tokens]


def run(kernel: Kernel, case: Case, repeats: int = 3) -> str | None:
    """None if the launch is right, bit-identical when repeated and stays inside its output; else what is wrong."""
    generator = torch.Generator("cuda").manual_seed(case.seed)
    per_expert = [schemes.parse(name) for name in case.scheme_names]
    weights = torch.randn(len(case.counts), case.n, case.k, generator=generator, device="cuda")
    weights *= 1 + 3 * torch.rand(len(case.counts), case.n, 1, generator=generator, device="cuda")
    x = torch.randn(sum(case.counts), case.k, generator=generator, device="cuda", dtype=torch.float32)
    x = (x * (0.5 + torch.rand(len(x), 1, generator=generator, device="cuda"))).to(torch.bfloat16)
    experts = Experts.from_weights(weights, per_expert)
    offsets = offsets_of(case.counts)
    expected = expected_of(x, weights, experts, offsets)
    if case.n % 8:
        return check_output(kernel(x, experts, offsets), expected)
    whole, out = poisoned(len(x), case.n)
    first = kernel(x, experts, offsets, out)
    torch.cuda.synchronize()
    problem = check_output(first, expected)
    if problem:
        return problem
    if not (whole[:GUARD_ROWS].isnan().all() and whole[GUARD_ROWS + len(x) :].isnan().all()):
        return "the launch wrote outside its output"
    for _ in range(repeats):
        if not torch.equal(kernel(x, experts, offsets, poisoned(len(x), case.n)[1]), first):
            return "a repeated launch gave other bits"
    return None


def expected_of(x: torch.Tensor, weights: torch.Tensor, experts: Experts, offsets: torch.Tensor):
    """The reference for the same quantised weights."""
    stacks = [
        quantize(weights[list(members)], scheme)
        for scheme, members in zip(experts.schemes, experts.members, strict=True)
    ]
    plan = experts.bind(experts.schemes).plan
    return expected_output(x, stacks, plan, offsets)


def emulated(scheme: QuantScheme) -> bool:
    """Whether this GPU emulates the scheme's MMA: values are right, times mean nothing."""
    return torch.cuda.get_device_capability() >= (9, 0) and scheme.math.name in ("INT4", "E4M3")
