import numpy as np
import pytest
import torch
from torch import Tensor

from allocator.calibration.experts import LinearStack
from allocator.calibration.gptq import factorise, gptq, row_objective, shrunk
from allocator.calibration.grid import nearest
from allocator.calibration.hadamard import Rotation
from allocator.calibration.quantizer import Method, Quantizer
from kernel_gen.formats import dequantize, pack, quantize, unpack
from profiles import schemes
from profiles.errors import SpecError
from profiles.schemes import QuantScheme

SCHEMES = [
    "w8a16_g-1_sym",
    "w4a16_g64_asym",
    "w4a16_g128_sym",
    "w3a16_g128_asym",
    "w2a16_g128_asym",
    "w2a16_g128_sym",
    "w8a8_g-1_sym",
    "w8a8_g-1_sym_e4m3",
    "w4a8_g128_sym_e4m3",
    "w4a4_g128_sym",
]
E, N, K = 3, 24, 160  # the last group of 64 and of 128 is a short one


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """Weights, and second moments of correlated inputs of which some are large and one is always zero."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(E, N, K, generator=generator)
    mixing = (
        torch.randn(E, K, K, generator=generator) * torch.logspace(-1, 0.5, K)[torch.randperm(K, generator=generator)]
    )
    x = torch.randn(E, 400, K, generator=generator) @ mixing / K**0.5
    x[:, :, 7] = 0
    return weights, x.mT @ x


def reference(
    weights: np.ndarray, moment: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: int, bits: int, lowest: int
) -> np.ndarray:
    """Optimal brain quantisation of one expert in float64, one column at a time, the inverse updated by elimination."""
    w, k = weights.astype(np.float64).copy(), weights.shape[1]
    order = np.argsort(-np.diag(moment), kind="stable")
    h = moment.astype(np.float64) + 0.01 * np.diag(moment).mean() * np.eye(k)
    left = list(order)
    inverse = np.linalg.inv(h[np.ix_(left, left)])
    codes = np.zeros(w.shape, dtype=np.int64)
    while left:
        column = left[0]
        scale, zero = scales[:, column // group], zeros[:, column // group]
        codes[:, column] = np.clip(np.round(w[:, column] / scale) + zero, lowest, 2**bits - 1)
        error = w[:, column] - (codes[:, column] - zero) * scale
        w[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
        left = left[1:]
    return codes


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "w8a8_g-1_sym_e4m3"])
def test_gptq_is_the_float64_reference(name: str, problem: tuple[Tensor, Tensor]) -> None:
    weights, moments = problem
    scheme = schemes.parse(name)
    start = quantize(weights, scheme)
    result = gptq(weights, moments, [start], factorise(moments))
    assert start.scales is not None
    zeros = torch.full_like(start.scales, 2.0 ** (scheme.weight_bits - 1)) if start.zeros is None else start.zeros
    group = K if scheme.group_size == -1 else scheme.group_size
    lowest = 1 if name == "w4a8_g128_sym_e4m3" else 0
    for e in range(E):
        expected = reference(
            weights[e].numpy(),
            moments[e].numpy(),
            start.scales[e].double().numpy(),
            zeros[e].double().numpy(),
            group,
            scheme.weight_bits,
            lowest,
        )
        kept = int(result.rows_kept_nearest[e])
        assert kept <= N // 4
        same = (result.weights.codes[e].numpy() == expected).mean()
        assert same >= 0.99 * (1 - kept / N)  # a near tie in float32 may fall the other way


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("clip", [False, True])
def test_gptq_is_never_worse_than_rounding_to_nearest(name: str, clip: bool, problem: tuple[Tensor, Tensor]) -> None:
    weights, moments = problem
    scheme = schemes.parse(name)
    result = Quantizer(method=Method.GPTQ, clip=clip).quantize(weights, scheme, moments, [400] * E)
    plain = row_objective(weights, quantize(weights, scheme), moments)
    reached = row_objective(weights, result.weights, moments)
    assert (reached <= plain * (1 + 1e-12)).all()
    torch.testing.assert_close(result.objective, reached.sum(-1))
    assert result.objective.sum() < 0.8 * plain.sum()


def test_adversarial_moments_do_not_make_gptq_worse() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(4, 8, 128, generator=generator)
    thin = torch.randn(4, 3, 128, generator=generator)
    scheme = schemes.parse("w2a16_g128_asym")
    cases = {
        "rank 3": thin.mT @ thin,
        "nothing": torch.zeros(4, 128, 128),
        "ill-scaled": torch.diag_embed(torch.logspace(-15, 15, 128)).expand(4, -1, -1),
    }
    for moments in cases.values():
        result = gptq(weights, moments, [quantize(weights, scheme)], factorise(moments, damping=0.0))
        assert bool(dequantize(result.weights).isfinite().all())
        assert (result.row_errors.sum(-1) <= result.nearest_objective).all()


def test_an_expert_sees_its_own_tokens_only(problem: tuple[Tensor, Tensor]) -> None:
    weights, moments = problem
    scheme = schemes.parse("w3a16_g128_asym")
    together = Quantizer().quantize(weights, scheme, moments, [400] * E)
    alone = Quantizer().quantize(weights[1:2], scheme, moments[1:2], [400])
    assert torch.equal(together.weights.expert(1).codes, alone.weights.codes)


def test_an_expert_without_tokens_is_rounded_to_nearest(problem: tuple[Tensor, Tensor]) -> None:
    weights, moments = problem
    scheme = schemes.parse("w3a16_g128_asym")
    silent = moments.clone()
    silent[1] = 0
    result = Quantizer(clip=False).quantize(weights, scheme, silent, [400, 0, 400])
    plain = quantize(weights, scheme)
    assert torch.equal(result.weights.codes[1], plain.codes[1])
    assert not torch.equal(result.weights.codes[0], plain.codes[0])


@pytest.mark.parametrize("name", ["w2a16_g128_sym", "w3a16_g64_asym", "w4a16_g-1_sym"])
def test_clipping_lowers_every_groups_error(name: str, problem: tuple[Tensor, Tensor]) -> None:
    weights, moments = problem
    scheme = schemes.parse(name)
    group = K if scheme.group_size == -1 else scheme.group_size
    plain, clipped = (dequantize(nearest(weights, scheme, moments, clip=clip)) - weights for clip in (False, True))
    for first in range(0, K, group):
        part = slice(first, first + group)
        before, after = ((d[..., part] @ moments[:, part, part] * d[..., part]).sum(-1) for d in (plain, clipped))
        assert (after <= before * 1.0001).all()
        assert after.sum() < before.sum()


def test_clipping_never_makes_gptq_worse(problem: tuple[Tensor, Tensor]) -> None:
    weights, moments = problem
    for name in SCHEMES:
        without, with_clip = (
            Quantizer(clip=clip).quantize(weights, schemes.parse(name), moments, [400] * E).row_errors
            for clip in (False, True)
        )
        assert (with_clip <= without).all()


def test_e4m3_is_not_clipped(problem: tuple[Tensor, Tensor]) -> None:
    weights, moments = problem
    scheme = schemes.parse("w8a8_g-1_sym_e4m3")
    assert torch.equal(nearest(weights, scheme, moments, clip=True).scales, quantize(weights, scheme).scales)


@pytest.mark.parametrize("name", ["w4a16_g128_sym", "w2a16_g128_asym", "w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3"])
def test_what_is_chosen_can_be_packed(name: str, problem: tuple[Tensor, Tensor]) -> None:
    weights, moments = problem
    chosen = Quantizer().quantize(weights, schemes.parse(name), moments, [400] * E).weights
    back = unpack(pack(chosen))
    assert torch.equal(dequantize(back), dequantize(chosen))


@pytest.mark.parametrize("k", [64, 96, 160, 352, 7])
def test_a_rotation_is_orthogonal(k: int) -> None:
    rotation = Rotation(k=k, seed=3)
    matrix = rotation.apply(torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(k, dtype=torch.float64))
    assert rotation.block == {64: 64, 96: 32, 160: 32, 352: 32, 7: 1}[k]
    sizes = matrix.abs()[matrix != 0]
    torch.testing.assert_close(sizes, torch.full_like(sizes, rotation.block**-0.5))
    h = torch.randn(k, k, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply_both(h), matrix.T @ h @ matrix)
    assert not torch.equal(Rotation(k=k, seed=4).signs(h), rotation.signs(h)) or k < 8


def test_rotation_tames_outliers_of_activations() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(1, 64, 128, generator=generator)
    x = torch.randn(256, 128, generator=generator)
    x[:, 5] *= 60
    scheme = schemes.parse("w4a4_g-1_sym")
    exact = x @ weights[0].T
    moments = (x.T @ x).unsqueeze(0)

    def error(quantizer: Quantizer) -> float:
        stack = quantizer.quantize(weights, scheme, moments, [256]).stack(torch.float32)
        return float((stack(x, 0) - exact).square().mean())

    assert error(Quantizer(rotate=True)) < 0.25 * error(Quantizer(rotate=False))
    assert Quantizer(rotate=True).rotation(schemes.parse("w4a16_g-1_sym"), 128) is None


def test_a_rotated_stack_without_rounding_changes_nothing() -> None:
    x, weights = torch.randn(10, 96), torch.randn(1, 8, 96)
    rotation = Rotation(k=96)
    stack = LinearStack(weights=rotation.apply(weights), rotation=rotation)
    torch.testing.assert_close(stack(x, 0), x @ weights[0].T, atol=1e-4, rtol=1e-5)


def test_settings_are_checked_and_named() -> None:
    with pytest.raises(SpecError, match="damping"):
        Quantizer(damping=-0.1)
    assert Quantizer(rotate=True).name == "gptq+clip+rotate"
    assert Quantizer(method=Method.RTN, clip=False).name == "rtn"


def test_shrinkage_is_the_estimators_formula() -> None:
    """Equation 23 of Chen et al. 2010, in float64; none where tokens are many, all where moments tell nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 30, K, generator=generator) * torch.logspace(-1, 0.5, K)
    moment = x.mT @ x
    h, n = moment[0].double().numpy(), 30
    square, trace = (h @ h).trace(), h.trace()
    share = ((1 - 2 / K) * square + trace**2) / ((n + 1 - 2 / K) * (square - trace**2 / K))
    assert 0.1 < share < 1
    expected = (1 - share) * h + share * trace / K * np.eye(K)
    np.testing.assert_allclose(shrunk(moment, [n])[0].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shrunk(moment, [10**9]), moment, rtol=1e-5, atol=1e-4)
    identity = torch.eye(K).unsqueeze(0)
    torch.testing.assert_close(shrunk(identity, [5]), identity)
    assert torch.equal(shrunk(0 * moment, [n]), 0 * moment)


@pytest.mark.parametrize("scheme", [schemes.parse("w3a16_g128_asym"), schemes.parse("w4a16_g128_asym")], ids=str)
def test_few_tokens_do_not_mislead_gptq(scheme: QuantScheme, problem: tuple[Tensor, Tensor]) -> None:
    """Learnt from half as many tokens as columns, judged by the moments of many others."""
    weights, _ = problem
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(E, K, K, generator=generator) * torch.logspace(-1, 0.5, K)
    few, many = (torch.randn(E, count, K, generator=generator) @ mixing for count in (K // 2, 8000))
    losses = {}
    for shrink in (False, True):
        quantizer = Quantizer(clip=False, shrink=shrink)
        result = quantizer.quantize(weights, scheme, few.mT @ few, [K // 2] * E)
        losses[shrink] = float(row_objective(weights, result.weights, many.mT @ many).sum())
    nearest_loss = float(row_objective(weights, quantize(weights, scheme), many.mT @ many).sum())
    assert losses[True] < 0.9 * losses[False]
    assert losses[True] < nearest_loss
