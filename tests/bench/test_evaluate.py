"""Evaluation of quantised checkpoints: against transformers' own model with its weights replaced; the paper's table."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from allocator import Sensitivity
from allocator.calibration.model import StreamedModel
from allocator.calibration.quantizer import Method, Quantizer
from allocator.sensitivity import SHARED_EXPERT
from bench import evaluate, paper_table
from bench.evaluate_tasks import assembled
from bench.evaluation import Evaluator, average_bits
from bench.paper_variants import GPTQ_CLIP, RTN, VARIANTS, Blend, Mixed, Uniform, assignment_of
from kernel_gen.formats import dequantize, quantize
from profiles import schemes
from profiles.errors import SpecError
from profiles.models import Linear, LinearId
from tests.bench.tiny import write_sources, write_untrained

W2, W4, W8, W4A4, W8A8 = (
    schemes.parse(name)
    for name in ("w2a16_g128_asym", "w4a16_g128_asym", "w8a16_g128_asym", "w4a4_g-1_sym", "w8a8_g-1_sym")
)
LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_untrained(out, write_sources(tmp_path_factory.mktemp("sources")))
    return out


def make_evaluator(folder: Path, layers_kept: int = 99) -> Evaluator:
    model = StreamedModel(folder, device="cpu", layers_kept=layers_kept)
    held_out, calibration = evaluate.read_texts(model, None, None, length=LENGTH, number=6, calibrating=8)
    return Evaluator(model=model, held_out=held_out.tokens, calibration=calibration.tokens, batch_size=4)


@pytest.fixture(scope="module")
def evaluator(folder: Path) -> Evaluator:
    return make_evaluator(folder)


def everything(evaluator: Evaluator, scheme):
    return dict.fromkeys(evaluator.linears, scheme)


def measured_by_transformers(model, exact, tokens) -> tuple[float, float]:
    """(perplexity, mean KL) of a model, computed the plain way."""
    with torch.no_grad():
        p, q = (m(tokens).logits.double().log_softmax(-1) for m in (exact, model))
    nll = functional.nll_loss(q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return float(nll.exp()), float((p.exp() * (p - q)).sum(-1).mean())


def replace_weights(model, scheme, layers=None) -> None:
    """Every expert's weights by what a scheme makes of them."""
    for index, layer in enumerate(model.model.layers):
        if layers is not None and index not in layers:
            continue
        experts, shared = layer.mlp.experts, layer.mlp.shared_expert
        tensors = (experts.gate_up_proj, experts.down_proj)
        linears = (shared.gate_proj, shared.up_proj, shared.down_proj)
        with torch.no_grad():
            for weights in (*tensors, *(linear.weight for linear in linears)):
                weights.copy_(dequantize(quantize(weights, scheme)).view_as(weights))


def test_unquantised_is_exact(evaluator: Evaluator, folder: Path):
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = evaluator.measure({}, RTN)
    perplexity, _ = measured_by_transformers(exact, exact, evaluator.held_out)
    assert found.mean_kl == 0
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert (found.avg_weight_bits, found.num_tokens) == (16, 6 * LENGTH)


def test_weight_only_is_the_model_with_its_weights_replaced(evaluator: Evaluator, folder: Path):
    exact, changed = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    replace_weights(changed, W4)
    perplexity, kl = measured_by_transformers(changed, exact, evaluator.held_out)
    found = evaluator.measure(everything(evaluator, W4), RTN)
    assert kl > 1e-4
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.mean_kl == pytest.approx(kl, rel=1e-3)
    assert found.avg_weight_bits == 4.25


def test_one_layer_only(evaluator: Evaluator, folder: Path):
    exact, changed = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    replace_weights(changed, W2, layers={1})
    _, kl = measured_by_transformers(changed, exact, evaluator.held_out)
    assignment = {linear: W2 for linear in evaluator.linears if linear.layer == 1}
    found = evaluator.measure(assignment, RTN)
    assert found.mean_kl == pytest.approx(kl, rel=1e-3)
    assert found.avg_weight_bits == pytest.approx((16 + 2.25) / 2)


@pytest.mark.parametrize("quantizer", [RTN, GPTQ_CLIP, Quantizer(method=Method.RTN, clip=False, rotate=True)])
def test_fewer_bits_diverge_more(evaluator: Evaluator, quantizer: Quantizer):
    losses = [evaluator.measure(everything(evaluator, scheme), quantizer).mean_kl for scheme in (W8, W4, W2)]
    assert losses == sorted(losses)
    assert losses[2] > 10 * losses[0]
    eight, four = (evaluator.measure(everything(evaluator, scheme), quantizer).mean_kl for scheme in (W8A8, W4A4))
    assert four > 10 * eight > 0


def test_activations_count(evaluator: Evaluator):
    weights_alone = schemes.parse("w4a16_g-1_sym")
    with_activations = evaluator.measure(everything(evaluator, W4A4), RTN)
    without = evaluator.measure(everything(evaluator, weights_alone), RTN)
    assert with_activations.mean_kl > 1.2 * without.mean_kl
    assert with_activations.avg_weight_bits == without.avg_weight_bits


def test_streaming_changes_nothing(evaluator: Evaluator, folder: Path):
    streamed = make_evaluator(folder, layers_kept=1)
    assert streamed.measure(everything(streamed, W2), GPTQ_CLIP) == evaluator.measure(
        everything(evaluator, W2), GPTQ_CLIP
    )
    assert evaluator.measure({}, RTN).mean_kl == 0


def test_a_linear_that_is_not_there_is_refused(evaluator: Evaluator):
    with pytest.raises(SpecError, match="layer 0, expert 16; tiny has none such"):
        evaluator.measure({LinearId(layer=0, expert=16, linear=Linear.DOWN): W4}, RTN)


def test_the_assembled_model_computes_the_same(evaluator: Evaluator, folder: Path):
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = assembled(evaluator, everything(evaluator, W4A4), RTN)
    perplexity, kl = measured_by_transformers(model, exact, evaluator.held_out)
    found = evaluator.measure(everything(evaluator, W4A4), RTN)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.mean_kl == pytest.approx(kl, rel=1e-3)


def options(folder: Path, *more: str) -> list[str]:
    size = ["--length", str(LENGTH), "--sequences", "6", "--calibration-sequences", "8", "--device", "cpu"]
    return ["--model", str(folder), *size, *more]


def test_the_command_says_what_the_library_does(evaluator: Evaluator, folder: Path, tmp_path: Path, capsys):
    more = ("--scheme", W2.name, "--method", "rtn", "--json", str(tmp_path / "found.json"))
    assert evaluate.main(options(folder, *more)) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    expected = evaluator.measure(everything(evaluator, W2), RTN)
    assert found["mean_kl"] == pytest.approx(expected.mean_kl, rel=1e-4)
    assert f"perplexity {found['perplexity']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--scheme", "w5a16"), "unknown scheme 'w5a16'"),
        (("--data", "missing.txt"), "missing.txt: no such file"),
        (("--batch-size", "0"), "--batch-size 0"),
        (("--threads", "0"), "--threads 0"),
        (("--tasks", "arc"), "lm-eval"),
        (("--allocation", "missing.json"), "missing.json"),
    ],
)
def test_mistakes_get_one_sentence(folder: Path, more: tuple[str, ...], sentence: str, capsys):
    assert evaluate.main(options(folder, *more)) == 2
    assert sentence in capsys.readouterr().err


def made_up_sensitivity(evaluator: Evaluator) -> Sensitivity:
    """Losses that fall with the bits; of expert 0 they count most."""
    losses = {
        (linear, scheme): (10.0 if linear.expert == 0 else 1.0) * 4.0**-scheme.weight_bits
        for linear in evaluator.linears
        for scheme in (schemes.parse("w2a16_g-1_asym"), W2, W4, W4A4, W8A8)
    }
    return Sensitivity.from_losses(losses, model="tiny", metric="made up", data="none", num_samples=1, seed=0)


def test_rules(evaluator: Evaluator):
    linears, shape = evaluator.linears, evaluator.model.shape
    assert any(linear.expert == SHARED_EXPERT for linear in linears)
    assert assignment_of(Uniform(scheme=None), linears, shape, None) == {}
    blend = assignment_of(Blend(low=W4A4, high=W8A8, avg_bits=6.3), linears, shape, None)
    assert 6.1 < average_bits(shape, linears, blend) <= 6.3
    mixed_rule = Mixed(schemes=(W2, W4, W8), avg_bits=2.5)
    mixed = assignment_of(mixed_rule, linears, shape, made_up_sensitivity(evaluator))
    assert set(mixed.values()) == {W2, W4}
    assert average_bits(shape, linears, mixed) <= 2.5 + 1e-9
    assert all(mixed[linear] == W4 for linear in linears if linear.expert == 0)
    with pytest.raises(SpecError, match="--sensitivity"):
        assignment_of(mixed_rule, linears, shape, None)


def test_names_of_the_rows_are_unique():
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)


def test_the_table_goes_on_rounding_by_rounding(
    evaluator: Evaluator, folder: Path, tmp_path: Path, monkeypatch, capsys
):
    out, sensitivity = tmp_path / "table.json", tmp_path / "sensitivity.parquet"
    made_up_sensitivity(evaluator).write(sensitivity)
    arguments = options(folder, "--settings", "W2.25", "--sensitivity", str(sensitivity), "--out", str(out))
    measure, calls = Evaluator.measure_all, []

    def killed_at_the_third(self, assignments, quantizer):
        calls.append(quantizer.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, assignments, quantizer)

    monkeypatch.setattr(Evaluator, "measure_all", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        paper_table.main(arguments)
    assert [row["quantizer"] for row in json.loads(out.read_text())["rows"]] == ["", "rtn", "rtn+clip"]
    assert paper_table.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == [v.name for v in VARIANTS if v.setting in ("bf16", "W2.25")]
    assert calls == ["rtn", "rtn+clip", "gptq", "gptq", "gptq+clip"]
    alone = evaluator.measure(everything(evaluator, W2), GPTQ_CLIP)
    found = next(row for row in rows if row["name"] == "W2.25, w2a16_g128_asym, gptq+clip")
    assert found["mean_kl"] == pytest.approx(alone.mean_kl, rel=1e-2)  # beside a mixed one, or by itself
    markdown = out.with_suffix(".md").read_text()
    assert markdown in capsys.readouterr().out
    assert markdown.count("\n| ") == 1 + len(rows)
    assert len(out.with_suffix(".csv").read_text().splitlines()) == 1 + len(rows)
    assert rows[-1]["is_mixed"]
    assert rows[-1]["avg_weight_bits"] <= 2.25


def test_a_table_of_something_else_is_refused(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "table.json"
    assert paper_table.main(options(folder, "--settings", "bf16", "--out", str(out))) == 0
    other = options(folder, "--settings", "bf16", "--out", str(out))
    other[other.index("6")] = "5"
    assert paper_table.main(other) == 2
    assert "a table of data 'held_out.txt, 6 x 32 tokens', now 'held_out.txt, 5 x 32 tokens'" in capsys.readouterr().err
    out.write_text("{}")
    assert paper_table.main(options(folder, "--out", str(out))) == 2
    assert paper_table.main(options(folder, "--out", str(tmp_path / "table.csv"))) == 2
    assert paper_table.main(options(folder, "--settings", "W9", "--out", str(out))) == 2
    assert "no rows of W9" in capsys.readouterr().err
