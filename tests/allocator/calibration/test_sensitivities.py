import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from allocator.calibration.data import Sequences
from allocator.calibration.experts import Experts
from allocator.calibration.layer_losses import LossOptions, layer_losses
from allocator.calibration.measured import divergence, final_outputs
from allocator.calibration.measures import MEASURES, measure_of
from allocator.calibration.model import LoadedLayer, StreamedModel
from allocator.calibration.partial import Partial, fingerprint
from allocator.calibration.quantizer import Method, Quantizer
from allocator.calibration.sensitivities import Calibration, calibrate, describe
from allocator.calibration.statistics import gather
from allocator.calibration.visits import advance, visit, visit_with_gradients
from kernel_gen.formats import dequantize, quantize
from profiles import schemes
from profiles.errors import DataError, SpecError
from profiles.models import Linear, LinearId

NAMES = ("w16a16", "w8a16_g-1_sym", "w4a16_g128_asym", "w2a16_g128_asym", "w8a8_g-1_sym", "w4a4_g-1_sym")
SCHEMES = tuple(schemes.parse(name) for name in NAMES)
OPTIONS = LossOptions(schemes=SCHEMES)
FEW = LossOptions(schemes=SCHEMES[3:5])


@pytest.fixture(scope="module")
def sequences(tokens: Tensor) -> Sequences:
    return Sequences(tokens=tokens, source="made up, 8 x 32 tokens")


@pytest.fixture(scope="module")
def calibrated(checkpoints: dict[str, Path], sequences: Sequences) -> Calibration:
    """All measures in one pass."""
    model = StreamedModel(checkpoints["qwen2_moe"], layers_kept=3)
    return calibrate(model, sequences, list(MEASURES.values()), OPTIONS, batch_size=8)


def test_every_linear_of_every_expert_has_a_loss_in_every_scheme(calibrated: Calibration) -> None:
    for name, sensitivity in calibrated.sensitivities.items():
        frame = sensitivity.frame()
        assert len(frame) == 2 * 9 * 2 * len(SCHEMES)  # layers, experts with the shared one, linears
        assert set(frame["layer"]) == {1, 2}
        assert set(frame["expert"]) == {-1, *range(8)}
        assert (frame["loss"] >= 0).all()
        assert sensitivity.metric == f"{name} of gptq+clip"
        assert sensitivity.provenance["num_samples"] == 256
        total = frame.groupby("scheme")["loss"].sum()
        assert total["w16a16"] < total["w8a16_g-1_sym"] < total["w4a16_g128_asym"] < total["w2a16_g128_asym"]
        assert total["w8a8_g-1_sym"] < total["w4a4_g-1_sym"]


def test_a_loss_is_the_change_of_the_blocks_output(checkpoints: dict[str, Path], sequences: Sequences) -> None:
    """MxMoE's definition, by running the whole block with one linear replaced."""
    model = StreamedModel(checkpoints["qwen2_moe"])
    options = replace(OPTIONS, quantizer=Quantizer(method=Method.RTN, clip=False), max_rows=None)
    scheme = schemes.parse("w2a16_g128_asym")
    measure = measure_of("block-l2")
    for seen in visit(model, sequences.tokens, batch_size=4):
        losses, _ = layer_losses(seen, [measure], options)
        block, layer = seen.layer.block, seen.layer
        assert block is not None
        x = seen.x.view(8, 32, -1)
        exact = block(x)
        for expert, linear in ((2, Linear.GATE_UP), (5, Linear.DOWN), (-1, Linear.GATE_UP), (-1, Linear.DOWN)):
            experts = layer.shared if expert == -1 else layer.routed
            assert isinstance(experts, Experts)
            base = experts.base[linear]
            weights = base.weights.clone()
            index = max(expert, 0)
            weights[index] = dequantize(quantize(base.weights[index], scheme))[0]
            experts.choose({**experts.chosen, linear: [replace(base, weights=weights)] * experts.num_experts})
            change = (block(x) - exact).double().square().sum() / seen.num_tokens
            experts.restore()
            key = (LinearId(layer=layer.index, expert=expert, linear=linear), scheme)
            assert losses[key]["block-l2"] == pytest.approx(float(change) ** 0.5, rel=1e-3)


def test_measured_kl_is_that_of_the_whole_model(checkpoints: dict[str, Path], sequences: Sequences) -> None:
    model = StreamedModel(checkpoints["qwen2_moe"], layers_kept=3)
    options = LossOptions(
        schemes=(schemes.parse("w2a16_g128_asym"),), quantizer=Quantizer(method=Method.RTN, clip=False)
    )
    found = calibrate(model, sequences, [measure_of("kl")], options, batch_size=4).sensitivities["kl"].frame()
    row = found[(found["layer"] == 1) & (found["expert"] == 3) & (found["linear"] == "down")].iloc[0]
    exact = final_outputs(model, sequences.tokens, batch_size=8)[0]
    experts = model.layer(1).routed
    assert experts is not None
    base = experts.base[Linear.DOWN]
    weights = base.weights.clone()
    weights[3] = dequantize(quantize(base.weights[3], options.schemes[0]))[0]
    experts.choose({**experts.chosen, Linear.DOWN: [replace(base, weights=weights)] * 8})
    hidden = model.embed(sequences.tokens)
    for index in range(model.num_layers):
        hidden = advance(model, model.layer(index), hidden)
    assert row["loss"] > 1e-6
    assert row["loss"] == pytest.approx(divergence(model, exact, hidden) / 256, rel=1e-3)


def test_gradients_are_those_of_the_whole_model(checkpoints: dict[str, Path], sequences: Sequences) -> None:
    """The block's gradient is the slope of the likelihood when its output is moved: by finite differences."""
    torch.manual_seed(0)
    model = StreamedModel(checkpoints["deepseek_v2"], dtype=torch.float64, layers_kept=3)
    for seen in visit_with_gradients(model, sequences.tokens[:2], batch_size=1, seed=5):
        assert seen.gradient is not None
        if seen.layer.index == 1:
            early = seen
    direction = torch.randn_like(early.x)
    generator = torch.Generator().manual_seed(5)
    drawn = []
    for final in final_outputs(model, sequences.tokens[:2], batch_size=1):
        drawn.append(torch.multinomial(model.logits(final).softmax(-1).flatten(0, 1), 1, generator=generator))

    def loss(step: float) -> float:
        total = 0.0
        for number, output in enumerate(early.outputs):
            moved = output + step * direction.view(2, 1, 32, -1)[number]
            logits = model.logits(advance(model, model.layer(2), moved)).double().log_softmax(-1)
            total -= float(logits.flatten(0, 1).gather(1, drawn[number]).sum())
        return total

    assert early.gradient is not None
    slope = float((early.gradient * direction).sum())
    assert (loss(1e-3) - loss(-1e-3)) / 2e-3 == pytest.approx(slope, rel=1e-3)


def test_cheap_measures_order_linears_as_the_measured_kl_does(calibrated: Calibration) -> None:
    def losses(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        frame = calibrated.sensitivities[name].frame()
        return frame[frame["scheme"].isin(NAMES[2:])]["loss"].to_numpy(dtype=np.float64)

    kl = losses("kl")
    for name, least in {"fisher": 0.94, "block-relative": 0.9, "statistic": 0.9, "block-l2": 0.8}.items():
        assert spearmanr(losses(name), kl).statistic > least, name
    assert losses("fisher").sum() == pytest.approx(kl.sum(), rel=0.5)  # the same unit; 256 sampled tokens
    assert losses("statistic").sum() == pytest.approx(losses("block-relative").sum(), rel=0.2)


def test_thinned_rows_estimate_all(checkpoints: dict[str, Path], sequences: Sequences) -> None:
    model = StreamedModel(checkpoints["olmoe"])
    measure = measure_of("block-relative")
    everything, thinned = (
        calibrate(model, sequences, [measure], replace(FEW, max_rows=rows)).sensitivities[measure.name].frame()["loss"]
        for rows in (None, 16)
    )
    assert thinned.sum() == pytest.approx(everything.sum(), rel=0.15)


def test_taking_experts_in_turns_changes_nothing(checkpoints: dict[str, Path], sequences: Sequences) -> None:
    model = StreamedModel(checkpoints["mixtral"])
    measure = measure_of("fisher")
    at_once, in_turns = (
        calibrate(model, sequences, [measure], replace(FEW, memory_bytes=size)).sensitivities[measure.name].frame()
        for size in (1 << 30, 1 << 18)
    )
    np.testing.assert_allclose(at_once["loss"], in_turns["loss"], rtol=1e-4, atol=1e-12)


def test_moments_are_the_tokens_own(qwen: StreamedModel, tokens: Tensor) -> None:
    seen = next(visit(qwen, tokens, batch_size=3))
    routed, shared = seen.groups()
    for group in (routed, shared):
        statistics = gather(group, range(group.experts.num_experts))
        for expert in range(group.experts.num_experts):
            rows = group.rows(expert)
            assert len(rows.tokens) == statistics.counts[expert]
            x = (seen.x[rows.tokens] * rows.weights[:, None]).double()
            torch.testing.assert_close(
                statistics.moments[Linear.GATE_UP][expert].double(), x.T @ x, rtol=1e-4, atol=1e-4
            )
    chosen = [(seen.index == expert).sum().item() for expert in range(8)]
    assert [routed.count(expert) for expert in range(8)] == chosen


def test_an_expert_without_tokens_gets_a_named_fallback(checkpoints: dict[str, Path], tokens: Tensor) -> None:
    model = StreamedModel(checkpoints["olmoe"])
    short = Sequences(tokens=tokens[:1, :6], source="6 tokens")
    everything = list(MEASURES.values())
    found = calibrate(StreamedModel(checkpoints["olmoe"], layers_kept=3), short, everything, FEW)
    idle = {s.layer.index: set(range(8)) - set(s.index.flatten().tolist()) for s in visit(model, short.tokens)}
    assert any(idle.values())
    seen = next(visit(model, short.tokens))
    (group,) = seen.groups()
    rows = group.rows(min(idle[0]))
    assert rows.is_stand_in
    assert rows.tokens.tolist() == list(range(6))
    assert rows.multiplicity * len(rows.tokens) == 0.5
    torch.testing.assert_close(rows.weights, seen.weights.mean().expand(6))
    for layer, experts in idle.items():
        assert set(found.notes[layer].never_routed) == experts
        assert set(found.notes[layer].few_tokens) == set(range(8)) - experts
    for sensitivity in found.sensitivities.values():
        frame = sensitivity.frame()
        rows = frame[frame["scheme"] == "w2a16_g128_asym"]
        for layer, experts in idle.items():
            mine = rows[rows["layer"] == layer].groupby("expert")["loss"].sum()
            assert (mine[list(experts)] > 0).all()
    text = "\n".join(describe(found.notes))
    assert "no token reached expert" in text
    assert "fewer tokens than inputs have features" in text


class KilledError(Exception):
    pass


def test_a_killed_calibration_goes_on(checkpoints: dict[str, Path], sequences: Sequences, tmp_path: Path) -> None:
    model = StreamedModel(checkpoints["olmoe"])
    measure = measure_of("block-relative")
    out = tmp_path / "s.parquet"
    whole = calibrate(model, sequences, [measure], FEW).sensitivities[measure.name]

    def mark() -> Partial:
        return Partial(out, fingerprint(model, sequences.tokens, [measure.name], FEW, 0))

    def kill(line: str) -> None:
        if line.startswith("layer 1"):
            raise KilledError

    with pytest.raises(KilledError):
        calibrate(model, sequences, [measure], FEW, partial=mark(), progress=kill)
    assert mark().layers() == [0, 1]
    lines: list[str] = []
    resumed = calibrate(model, sequences, [measure], FEW, partial=mark(), progress=lines.append)
    assert resumed.resumed == (0, 1)
    assert [line.partition(":")[0] for line in lines] == ["layer 0", "layer 1", "layer 2"]
    assert "done by an earlier run" in lines[0]
    assert resumed.sensitivities[measure.name].frame().equals(whole.frame())
    # all done: not even a forward pass
    again = calibrate(model, sequences, [measure], FEW, partial=mark())
    assert again.resumed == (0, 1, 2)
    (mark().folder / "layer-2.json").write_text("{}")
    with pytest.raises(DataError, match="not a calibration's layer"):
        calibrate(model, sequences, [measure], FEW, partial=mark())
    mark().remove()
    assert list(tmp_path.iterdir()) == []


def test_other_settings_do_not_take_these_layers(qwen: StreamedModel, tokens: Tensor) -> None:
    marks = {
        fingerprint(qwen, tokens, ["kl"], OPTIONS, 0),
        fingerprint(qwen, tokens + 1, ["kl"], OPTIONS, 0),
        fingerprint(qwen, tokens, ["fisher"], OPTIONS, 0),
        fingerprint(qwen, tokens, ["kl"], replace(OPTIONS, schemes=SCHEMES[:2]), 0),
        fingerprint(qwen, tokens, ["kl"], replace(OPTIONS, quantizer=Quantizer(rotate=True)), 0),
        fingerprint(qwen, tokens, ["kl"], OPTIONS, 1),
    }
    assert len(marks) == 6
    assert fingerprint(qwen, tokens, ["kl"], OPTIONS, 0) in marks


def test_nothing_to_measure(qwen: StreamedModel, sequences: Sequences) -> None:
    with pytest.raises(SpecError, match="at least one measure"):
        calibrate(qwen, sequences, [], OPTIONS)
    with pytest.raises(SpecError, match=r"unknown measure 'l3': known are block-l2"):
        measure_of("l3")


@pytest.mark.parametrize("name", ["block-relative", "fisher"])
def test_one_layer_is_in_memory_at_a_time(name: str, checkpoints: dict[str, Path], sequences: Sequences) -> None:
    model = StreamedModel(checkpoints["mixtral"])
    read = model._load
    alive: list[int] = []

    def counting(index: int) -> LoadedLayer:
        gc.collect()
        alive.append(sum(type(thing) is Experts for thing in gc.get_objects()))
        return read(index)

    gc.collect()
    others = sum(type(thing) is Experts for thing in gc.get_objects())
    model._load = counting  # type: ignore[method-assign]
    options = LossOptions(schemes=SCHEMES[2:3])
    calibrate(model, sequences, [measure_of(name)], options, batch_size=4)
    assert len(alive) >= 3
    assert max(alive) == others


def test_bf16_gives_nearly_the_same_losses(checkpoints: dict[str, Path], sequences: Sequences) -> None:
    measure = measure_of("fisher")
    precise, half = (
        calibrate(StreamedModel(checkpoints["deepseek_v3"], dtype=dtype), sequences, [measure], FEW, batch_size=4)
        .sensitivities["fisher"]
        .frame()["loss"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.sum() == pytest.approx(precise.sum(), rel=0.3)
    assert spearmanr(precise, half).statistic > 0.9
