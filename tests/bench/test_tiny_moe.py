"""The small model: its corpus, its experts and routers, its training and its checkpoint."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from allocator.calibration.measured import final_outputs
from allocator.calibration.model import StreamedModel
from bench.tiny_moe.__main__ import main, train_model
from bench.tiny_moe.corpus import END_OF_TEXT, Split, encode, read_corpus, split_of, train_tokenizer
from bench.tiny_moe.model import GROUPED_EXPERTS, RouterTap, make_model, uniform_routing, zipf_targets
from bench.tiny_moe.report import token_losses, windows
from bench.tiny_moe.train import Trainer
from profiles.errors import DataError, SpecError
from tests.bench.tiny import PRESET, write_sources

NUM_EXPERTS = 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def trained(sources: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("trained") / "model"
    return out, train_model(PRESET, out, device="cpu", corpus_folder=sources)


def make_trainer(state: Path, seed: int = 0) -> tuple[torch.nn.Module, Trainer]:
    ids = np.random.default_rng(1).integers(0, PRESET.vocab_size, 4000).astype(np.uint16)
    model = make_model(PRESET, 0, seed)
    return model, Trainer(model, PRESET, ids, windows(ids, PRESET.sequence_length, 64), seed, state)


def test_files_are_split_by_their_names_alone():
    splits = [split_of(f"package/file_{i}.py") for i in range(4000)]
    assert {split: splits.count(split) // 40 for split in Split} == {
        Split.TRAIN: pytest.approx(90, abs=2),
        Split.VALIDATION: pytest.approx(5, abs=2),
        Split.HELD_OUT: pytest.approx(5, abs=2),
    }


def test_the_corpus_leaves_out_third_parties_and_other_encodings(sources: Path, tmp_path: Path):
    copy = write_sources(tmp_path)
    (copy / "site-packages").mkdir()
    (copy / "site-packages" / "theirs.py").write_text("theirs = 1\n")
    (copy / "latin.py").write_bytes("name = 'Jürgen'\n".encode("latin-1"))
    (copy / "empty.py").write_text("")
    assert read_corpus(copy) == read_corpus(sources)


def test_a_folder_without_sources_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no Python sources for train, validation, held_out"):
        read_corpus(tmp_path)


def test_a_corpus_can_be_cut(sources: Path):
    whole, cut = read_corpus(sources), read_corpus(sources, max_bytes=1000)
    assert 1000 <= cut.num_bytes(Split.TRAIN) < whole.num_bytes(Split.TRAIN)
    assert cut.texts[Split.TRAIN] == whole.texts[Split.TRAIN][: len(cut.texts[Split.TRAIN])]


TOKENIZER = train_tokenizer(["def function(x):\n    return x\n" * 20], 300)


@settings(max_examples=50)
@given(st.text().filter(lambda text: END_OF_TEXT not in text))
def test_no_text_is_lost_in_tokens(text: str):
    ids = encode(TOKENIZER, [text])
    assert TOKENIZER.decode(ids.tolist(), skip_special_tokens=True) == text


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(SpecError, match="256 bytes"):
        train_tokenizer(["text"], 256)


def test_grouped_experts_compute_what_transformers_does():
    model = make_model(PRESET, 0, 0)
    tokens = torch.arange(96).view(3, 32)
    found = {}
    for implementation in (GROUPED_EXPERTS, "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(tokens).logits
        logits.square().mean().backward()
        found[implementation] = [logits, *(parameter.grad for parameter in model.parameters())]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_balance_loss_is_least_at_the_targets():
    model = make_model(PRESET, 0, 0)
    tap = RouterTap(model)
    target = zipf_targets(1, 0)
    assert target.sum() == pytest.approx(1)
    assert float(target.max() / target.min()) == pytest.approx(NUM_EXPERTS)

    def loss(share: torch.Tensor) -> float:
        rows = (share * 10000).round().long()
        tap.choices = [torch.arange(NUM_EXPERTS).repeat_interleave(rows).view(-1, 1)]
        tap.logits = [share.log().expand(len(tap.choices[0]), NUM_EXPERTS)]
        return float(tap.balance_loss(target))

    at_target = loss(target[0])
    assert at_target == pytest.approx(1, abs=0.01)
    assert loss(torch.full((NUM_EXPERTS,), 1 / NUM_EXPERTS)) > 1.2
    assert loss(target[0].roll(1)) > 1.2


def test_uniform_routing_ends_with_its_block():
    model = make_model(PRESET, 0, 0)
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        before = model(tokens).logits
        with uniform_routing(model, seed=0):
            within = model(tokens).logits
        after = model(tokens).logits
    assert not torch.equal(before, within)
    assert torch.equal(before, after)


def test_loss_falls(trained):
    _, report = trained
    assert report["validation_loss"] < 0.7 * math.log(PRESET.vocab_size)
    perplexity = report["held_out_perplexity"]
    assert perplexity["model"] < 0.7 * perplexity["unigram"]
    assert np.sum(report["held_out_tokens_per_expert"]) == 2 * PRESET.num_layers * report["held_out_tokens"]


def test_the_checkpoint_is_what_was_measured(trained, sources: Path):
    out, report = trained
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = (out / "held_out.txt").read_text()
    assert text == "".join(text + END_OF_TEXT for text in read_corpus(sources).texts[Split.HELD_OUT])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    sequences = windows(np.array(ids, dtype=np.uint16), PRESET.sequence_length, PRESET.num_eval_tokens)
    losses = token_losses(model, sequences, PRESET.batch_size)
    assert float(losses.mean().exp()) == pytest.approx(report["held_out_perplexity"]["model"], rel=1e-5)
    streamed = StreamedModel(out, device="cpu")
    (hidden,) = final_outputs(streamed, sequences[:2], batch_size=2)
    with torch.no_grad():
        torch.testing.assert_close(streamed.logits(hidden), model(sequences[:2]).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2_moe"
    assert not out.with_name("model.training.pt").exists()


def test_a_finished_training_is_left_as_it_is(trained, sources: Path):
    out, report = trained
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train_model(PRESET, out, device="cpu", corpus_folder=sources) == report
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path):
    whole, trainer = make_trainer(tmp_path / "none.pt")
    assert trainer.run(lambda _: None)
    _, first = make_trainer(tmp_path / "state.pt")
    assert not first.run(lambda _: None, max_steps=7)
    resumed, second = make_trainer(tmp_path / "state.pt")
    assert second.progress.step == 7
    assert second.run(lambda _: None)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_states_of_other_trainings_are_refused(tmp_path: Path):
    _, trainer = make_trainer(tmp_path / "state.pt")
    trainer.run(lambda _: None, max_steps=1)
    with pytest.raises(DataError, match="another training"):
        make_trainer(tmp_path / "state.pt", seed=1)
    content = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="truncated or foreign"):
        make_trainer(tmp_path / "state.pt")


def test_steps_are_bounded_by_passes_over_the_text():
    preset = dataclasses.replace(PRESET, num_steps=1000, max_passes=2)
    assert preset.steps_on(128 * 50) == 100
    assert preset.steps_on(10**9) == 1000
    assert preset.steps_on(1) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "0"], "--minutes 0: a number above 0 is needed"),
        (["--steps", "-1"], "--steps -1: a number above 0 is needed"),
        (["--device", "abacus"], "--device abacus: cpu or cuda"),
        (["--corpus", "{here}"], "no Python sources"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], sentence: str, tmp_path: Path, capsys):
    arguments = [argument.format(here=tmp_path) for argument in arguments]
    assert main(["train", "--out", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path, capsys):
    assert main(["train", "--out", str(tmp_path)]) == 2
    assert "is no trained model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_ci_preset_is_far_better_than_its_baselines(tmp_path: Path):
    command = [sys.executable, "-m", "bench.tiny_moe", "train", "--preset", "ci", "--device", "cpu"]
    subprocess.run([*command, "--out", str(tmp_path / "model")], check=True, capture_output=True)
    report = json.loads((tmp_path / "model" / "training.json").read_text())
    perplexity = report["held_out_perplexity"]
    assert perplexity["model"] < perplexity["uniform_routing"] / 1.5
    assert perplexity["model"] < perplexity["unigram"] / 3
    assert (report["preset"]["num_layers"], NUM_EXPERTS) == (6, len(report["held_out_tokens_per_expert"][0]))
    # Threads add in another order on every run: the busiest expert of a layer came out at 2.1 to 6.5 times the mean.
    assert all(max(row) > 1.5 * np.mean(row) for row in report["held_out_tokens_per_expert"])
