import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from allocator import additivity as command
from allocator.calibration.additivity import (
    Blocks,
    Correction,
    features,
    fit,
    judge,
    random_allocations,
    rank_correlation,
)
from allocator.calibration.check import CheckOptions, check_additivity, corrected, draw
from allocator.calibration.data import Sequences
from allocator.calibration.layer_losses import LossOptions, turns
from allocator.calibration.measured import divergence, final_outputs
from allocator.calibration.measures import measure_of
from allocator.calibration.model import StreamedModel
from allocator.calibration.quantizer import Method, Quantizer
from allocator.calibration.sensitivities import calibrate
from allocator.calibration.streams import measure_allocations
from allocator.calibration.visits import advance, visit
from allocator.sensitivity import Sensitivity
from kernel_gen.formats import dequantize, quantize
from profiles import schemes
from profiles.errors import DataError, SpecError
from profiles.models import Linear, LinearId
from tests.allocator.calibration import tiny

SCHEMES = tuple(schemes.parse(f"w{bits}a16_g128_asym") for bits in (2, 3, 4, 8))
RTN = Quantizer(method=Method.RTN, clip=False)


@pytest.fixture(scope="module")
def sensitivity(checkpoints: dict[str, Path], tokens: Tensor) -> Sensitivity:
    model = StreamedModel(checkpoints["qwen2_moe"])
    sequences = Sequences(tokens=tokens, source="8 x 32 tokens")
    measure = measure_of("fisher")
    options = LossOptions(schemes=SCHEMES, quantizer=RTN, max_rows=None)
    return calibrate(model, sequences, [measure], options, batch_size=8).sensitivities["fisher"]


@pytest.fixture
def blocks(sensitivity: Sensitivity, qwen: StreamedModel) -> Blocks:
    return Blocks.of(sensitivity, qwen.shape)


def test_an_allocation_is_measured_as_the_model_runs_with_it(qwen: StreamedModel, tokens: Tensor) -> None:
    model = qwen
    w2 = SCHEMES[0]
    chosen = {
        LinearId(layer=1, expert=4, linear=Linear.DOWN): w2,
        LinearId(layer=2, expert=0, linear=Linear.GATE_UP): w2,
    }
    nothing: dict[LinearId, schemes.QuantScheme] = {}
    found = measure_allocations(model, tokens, tokens, [chosen, nothing], RTN, batch_size=4)
    assert found.allocations[1].kl == 0
    assert found.allocations[1].perplexity == found.exact_perplexity
    exact = final_outputs(model, tokens, batch_size=8)[0]
    hidden = model.embed(tokens)
    for index in range(3):
        layer = model.layer(index)
        for block in (block for block in chosen if block.layer == index):
            assert layer.routed is not None
            base = layer.routed.base[block.linear]
            weights = base.weights.clone()
            weights[block.expert] = dequantize(quantize(weights[block.expert], w2))[0]
            layer.routed.choose({**layer.routed.chosen, block.linear: [replace(base, weights=weights)] * 8})
        hidden = advance(model, layer, hidden)
    assert found.allocations[0].kl > 1e-6
    assert found.allocations[0].kl == pytest.approx(divergence(model, exact, hidden) / tokens.numel(), rel=1e-3)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert found.allocations[0].perplexity == pytest.approx(float(nll.exp()), rel=1e-4)


def test_experts_in_turns_are_measured_alike(
    qwen: StreamedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = {
        LinearId(layer=layer, expert=expert, linear=linear): SCHEMES[expert % 2]
        for layer in (1, 2)
        for expert in range(-1, 8)
        for linear in Linear
    }
    at_once = measure_allocations(qwen, tokens, tokens, [everything], RTN)
    monkeypatch.setattr("allocator.calibration.layer_losses._CPU_BYTES", 1 << 19)
    assert len(list(turns(next(visit(qwen, tokens)).groups()[0], 2))) > 2
    in_turns = measure_allocations(qwen, tokens, tokens, [everything], RTN)
    assert in_turns.allocations[0].kl == pytest.approx(at_once.allocations[0].kl, rel=1e-4)


def test_what_cannot_be_measured_is_refused(qwen: StreamedModel, tokens: Tensor) -> None:
    with pytest.raises(SpecError, match="no allocation"):
        measure_allocations(qwen, tokens, tokens, [], RTN)
    for layer, expert in ((0, 1), (1, 8)):
        block = LinearId(layer=layer, expert=expert, linear=Linear.DOWN)
        with pytest.raises(SpecError, match=f"layer {layer}, expert {expert}"):
            measure_allocations(qwen, tokens, tokens, [{block: SCHEMES[0]}], RTN)


def test_random_allocations_have_the_bits_that_were_asked(blocks: Blocks) -> None:
    targets = [3.0, 4.5, 4.5, 6.0]
    drawn = random_allocations(blocks, targets, seed=1)
    for choice, target in zip(drawn, targets, strict=True):
        assert blocks.average_bits(choice) == pytest.approx(target, abs=0.25)  # the largest linear, a step down
        assert blocks.average_bits(choice) <= target
    assert not np.array_equal(drawn[1], drawn[2])
    assert all(np.array_equal(a, b) for a, b in zip(drawn, random_allocations(blocks, targets, seed=1), strict=True))
    with pytest.raises(SpecError, match=r"1\.5 average bits: these schemes reach 2\."):
        random_allocations(blocks, [1.5], seed=0)


def test_a_fit_finds_planted_weights(blocks: Blocks) -> None:
    choices = random_allocations(blocks, list(np.linspace(3, 6, 60)), seed=0)
    for correction, planted in (
        (Correction.LAYER_WEIGHTS, np.array([0.5, 3.0])),
        (Correction.SCHEME_WEIGHTS, np.array([0.2, 1.0, 2.0, 1.5])),
        (Correction.SECOND_ORDER, np.array([1.0, 2.0, 0.0, 30.0, 5.0])),
    ):
        measured = features(blocks, choices, correction) @ planted
        found = fit(blocks, choices, measured, correction)
        np.testing.assert_allclose(found.predict(blocks, choices), measured, rtol=1e-6)
        if correction is Correction.SECOND_ORDER:
            with pytest.raises(SpecError, match="no sum"):
                found.corrected(blocks)
        else:
            sums = features(replace(blocks, losses=found.corrected(blocks)), choices, Correction.NONE)[:, 0]
            np.testing.assert_allclose(sums, measured, rtol=1e-6)


def test_a_correction_is_chosen_only_where_it_pays(blocks: Blocks) -> None:
    choices, groups = draw(blocks, CheckOptions(low=3, high=6, number=60, equal=(4.0,), number_equal=30))
    assert {name: len(rows) for name, rows in groups.items()} == {"3 to 6 bits": 60, "4 bits": 30}
    additive = features(blocks, choices, Correction.NONE)[:, 0]
    perplexity = np.exp(additive)
    plain = judge(blocks, choices, groups, additive, perplexity, 1.0, seed=0)
    assert plain.chosen is Correction.NONE
    assert plain.correlations(Correction.NONE) == {"3 to 6 bits": pytest.approx(1), "4 bits": pytest.approx(1)}
    skewed = features(blocks, choices, Correction.LAYER_WEIGHTS) @ np.array([1.0, 50.0])
    judged = judge(blocks, choices, groups, skewed, perplexity, 1.0, seed=0)
    assert judged.chosen is Correction.LAYER_WEIGHTS
    assert min(judged.correlations(Correction.LAYER_WEIGHTS).values()) > 0.999
    assert judged.correlations(Correction.NONE)["4 bits"] < 0.99


def test_rank_correlation() -> None:
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 10, 1000])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert rank_correlation(np.zeros(3), np.array([3.0, 2, 1])) == 0


def test_predictions_order_random_allocations(
    qwen: StreamedModel, tokens: Tensor, sensitivity: Sensitivity, blocks: Blocks
) -> None:
    held_out = Sequences(tokens=torch.from_numpy(tiny.token_ids(128, seed=1)).view(4, 32), source="held out")
    calibration = Sequences(tokens=tokens, source="8 x 32 tokens")
    options = CheckOptions(low=3, high=6, number=20, equal=(4.5,), number_equal=10, at_once=16)
    found = check_additivity(qwen, held_out, calibration, sensitivity, RTN, options)
    assert len(found.measured_kl) == 30
    assert found.correlations(Correction.NONE)["3 to 6 bits"] > 0.9
    total = features(blocks, draw(blocks, options)[0], Correction.NONE)[:, 0]
    assert 0.3 < np.median(total / found.measured_kl) < 3  # nats, both
    if found.chosen is not Correction.SECOND_ORDER:
        again = Blocks.of(corrected(sensitivity, found, blocks), qwen.shape)
        choices = draw(blocks, options)[0]
        np.testing.assert_allclose(
            features(again, choices, Correction.NONE)[:, 0], found.fit.predict(blocks, choices), rtol=1e-9
        )
    foreign = Sensitivity(sensitivity.frame().assign(model="another"))
    with pytest.raises(DataError, match="of another, the checkpoint is qwen2_moe"):
        check_additivity(qwen, held_out, calibration, foreign, RTN, options)


def test_options_are_checked() -> None:
    with pytest.raises(SpecError, match="must be less"):
        CheckOptions(low=4, high=3)
    with pytest.raises(SpecError, match="at least 10"):
        CheckOptions(low=3, high=4, number=5)


def test_the_command(
    checkpoints: dict[str, Path], sensitivity: Sensitivity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", tiny.token_ids(128))
    sensitivity.write(tmp_path / "s.parquet")
    arguments = [
        *("--model", str(checkpoints["qwen2_moe"]), "--data", str(tmp_path / "ids.npy")),
        *("--held-out", str(tmp_path / "ids.npy"), "--sensitivity", str(tmp_path / "s.parquet")),
        *("--bits", "3-6", "--allocations", "12", "--sequence-length", "32", "--quiet", "--method", "rtn", "--no-clip"),
        *("--out", str(tmp_path / "report.json")),
    ]
    assert command.main(arguments) == 0
    assert "Spearman with measured KL" in capsys.readouterr().out
    content = json.loads((tmp_path / "report.json").read_text())
    assert len(content["measured_kl"]) == 12
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    names = [scheme.name for scheme in sensitivity.schemes]
    assert command.main([*arguments, "--schemes", ",".join(names), "--json", "--plot", str(tmp_path / "p.svg")]) == 0
    assert json.loads(capsys.readouterr().out)["measured_kl"] == content["measured_kl"]
    assert "Spearman" in (tmp_path / "p.svg").read_text()
    assert command.main([*arguments, "--schemes", names[0]]) == 2
    assert "average bits: these schemes reach" in capsys.readouterr().err
    assert command.main([*arguments, "--schemes", "w8a8_g-1_sym_e4m3"]) == 2
    assert "the sensitivity has no w8a8_g-1_sym_e4m3" in capsys.readouterr().err
    assert set(content["spearman"]) == {correction.value for correction in Correction}
    assert command.main([*arguments[:8], "--bits", "3", "--out", str(tmp_path / "x.json")]) == 2
    assert "--bits 3: it is LOW-HIGH" in capsys.readouterr().err
    assert command.main([*arguments, "--corrected", str(tmp_path / "no" / "c.parquet")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
