"""The reference against plain loops, and the check: a kernel's arithmetic passes, a broken kernel's does not."""

import numpy as np
import pytest
import torch

from kernel_gen.formats import (
    Expected,
    check_output,
    dequantize,
    dequantize_activations,
    expected_output,
    quantize,
    quantize_activations,
)
from profiles.gpus import Math
from profiles.schemes import KERNEL_SCHEMES, parse

EACH = pytest.mark.parametrize("scheme", KERNEL_SCHEMES, ids=str)
N, K = 48, 512
COUNTS = (5, 0, 1, 10)


def problem(schemes, values="normal", seed=0):
    """(x, stacks, plan, offsets): expert e has schemes[e % len(schemes)], long experts first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(COUNTS), K, generator=generator).to(torch.bfloat16)
    w = torch.randn(len(COUNTS), N, K, generator=generator) * 0.05
    if values == "positive":
        x, w = x.abs(), w.abs()
    if values == "constant":
        x, w = torch.full_like(x, 0.7), torch.full_like(w, 0.3)
    members = [[e for e in range(len(COUNTS)) if e % len(schemes) == slot] for slot in range(len(schemes))]
    stacks = [quantize(w[experts], scheme) for scheme, experts in zip(schemes, members, strict=True)]
    plan = [[e, e % len(schemes), members[e % len(schemes)].index(e), 0] for e in np.argsort(COUNTS)[::-1]]
    offsets = torch.tensor([0, *np.cumsum(COUNTS)], dtype=torch.int32)
    return x, stacks, torch.tensor(plan, dtype=torch.int32), offsets


def as_a_kernel(x, stacks, plan, offsets):
    """The `mma` family's arithmetic: group scales rounded into bf16 operands, float32 sums in other order, bf16 out."""
    y = torch.empty(len(x), N, dtype=torch.bfloat16)
    for expert, slot, index, _ in plan.tolist():
        scheme = stacks[slot].scheme
        w = dequantize(stacks[slot].expert(index))[0]
        if scheme.math is Math.BF16 and scheme.group_size != -1:
            w = w.to(torch.bfloat16).float()
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        tokens = dequantize_activations(quantize_activations(x[rows], scheme))
        total = torch.zeros(len(tokens), N)
        for k in reversed(range(0, K, 16)):
            total += tokens[:, k : k + 16] @ w[:, k : k + 16].T
        y[rows] = total.to(torch.bfloat16)
    return y


def test_reference_is_the_plain_sum():
    x, stacks, plan, offsets = problem([parse("w8a8_g-1_sym"), parse("w4a4_g128_sym")])
    y = expected_output(x, stacks, plan, offsets, dtype=torch.float64).y.numpy()
    for expert, slot, index, _ in plan.tolist():
        w = dequantize(stacks[slot])[index].double().numpy()
        tokens = dequantize_activations(quantize_activations(x, stacks[slot].scheme)).double().numpy()
        for t in range(offsets[expert], offsets[expert + 1]):
            for n in range(0, N, 7):
                assert y[t, n] == pytest.approx(sum(tokens[t, k] * w[n, k] for k in range(K)), rel=1e-9, abs=1e-12)


@EACH
def test_reference_is_near_the_unquantised_product(scheme):
    """Loose, but independent of the quantisers: the noise of 2 bits is the largest, about half of the signal."""
    x, stacks, plan, offsets = problem([scheme])
    w = torch.randn(len(COUNTS), N, K, generator=torch.Generator().manual_seed(9)) * 0.05
    stacks = [quantize(w, scheme)]
    y = expected_output(x, stacks, plan, offsets).y
    true = torch.cat([x[offsets[e] : offsets[e + 1]].float() @ w[e].T for e in range(len(COUNTS))])
    limit = {2: 0.9, 3: 0.45, 4: 0.25, 8: 0.06, 16: 0.01}[scheme.weight_bits]
    assert (y - true).norm() < limit * true.norm()


@EACH
@pytest.mark.parametrize("values", ["normal", "positive", "constant"])
def test_a_right_kernel_passes(scheme, values):
    for seed in range(3):
        case = problem([scheme], values, seed)
        assert check_output(as_a_kernel(*case), expected_output(*case)) is None


def test_mixed_schemes_pass_and_mixed_up_slots_do_not():
    case = problem([parse("w4a16_g128_asym"), parse("w8a8_g-1_sym")])
    expected = expected_output(*case)
    assert check_output(as_a_kernel(*case), expected) is None
    x, stacks, plan, offsets = case
    plan = plan.clone()
    plan[:, 2] = 1 - plan[:, 2]
    assert check_output(as_a_kernel(x, stacks, plan, offsets), expected) is not None


@EACH
def test_broken_kernels_are_caught(scheme):
    x, stacks, plan, offsets = problem([scheme])
    expected = expected_output(x, stacks, plan, offsets)
    y = as_a_kernel(x, stacks, plan, offsets)
    swapped = y[:, [1, 0, *range(2, N)]]
    assert check_output(swapped, expected) is not None
    short_of_a_k_tile = x.clone()
    short_of_a_k_tile[:, -64:] = 0
    assert check_output(as_a_kernel(short_of_a_k_tile, stacks, plan, offsets), expected) is not None
    assert check_output(y.roll(1, 0), expected) is not None
    assert check_output(torch.zeros_like(y), expected) is not None
    for value in (torch.nan, torch.inf):
        poisoned = y.clone()
        poisoned[3, 7] = value
        assert f"y[3, 7] is {value}" in check_output(poisoned, expected)


def test_the_sentence_names_the_worst_place_and_counts():
    expected = Expected(y=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), tolerance=torch.full((2, 2), 0.1))
    y = torch.tensor([[1.05, 2.2], [3.0, 5.0]])
    assert check_output(y, expected) == "y[1, 1] is 5, expected 4 within 0.1; 2 of 4 values are off"
    assert check_output(y[:1], expected) == "output is [1, 2], expected [2, 2]"


def test_no_tokens_at_all():
    _, stacks, plan, _ = problem([parse("w4a16_g128_sym")])
    expected = expected_output(torch.zeros(0, K), stacks, plan, torch.zeros(len(COUNTS) + 1, dtype=torch.int32))
    assert expected.y.shape == (0, N)
    assert check_output(torch.zeros(0, N, dtype=torch.bfloat16), expected) is None
