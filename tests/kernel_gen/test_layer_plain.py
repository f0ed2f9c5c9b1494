"""The steps in torch's operators, which the kernels' steps are held against, on the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kernel_gen.layer import plain  # noqa: E402


@pytest.mark.parametrize(
    ("num_experts", "tokens", "top_k"), [(1, 1, 1), (8, 33, 8), (600, 20, 4), (5, 7, 5), (4, 50, 2), (3, 0, 2)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_what_is_routed_comes_back_weighted(num_experts: int, tokens: int, top_k: int, dtype: torch.dtype) -> None:
    """Expert e multiplies by e + 1; ids outside, of other ranks, add nothing, though their rows hold NaN."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, num_experts + 2, (tokens, top_k), generator=generator).to(dtype)
    hidden = torch.randint(-4, 5, (tokens, 16), generator=generator).float()
    weights = torch.randint(0, 3, (tokens, top_k), generator=generator).float()

    routing = plain.route(ids, num_experts)

    is_ours = (ids >= 0) & (ids < num_experts)
    counts = torch.bincount(ids[is_ours].long(), minlength=num_experts)
    assert routing.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert sorted(routing.positions.flatten().tolist()) == list(range(tokens * top_k))

    y = torch.full((tokens * top_k, 16), torch.nan)
    y[routing.positions.flatten()] = hidden.repeat_interleave(top_k, dim=0)
    factors = torch.arange(1, num_experts + 1).repeat_interleave(counts)
    y[: len(factors)] *= factors[:, None]
    y[len(factors) :] = torch.nan
    factor_of = torch.where(is_ours, ids.long() + 1, 0)
    expected = (hidden[:, None] * (factor_of * weights)[..., None]).sum(1)
    assert torch.equal(plain.combine(y, routing, weights), expected.bfloat16())
