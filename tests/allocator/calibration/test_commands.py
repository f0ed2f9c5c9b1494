"""`python -m allocator.trace` and `python -m allocator.calibrate`: what they write, and how they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from allocator import Budget, Sensitivity, allocate, calibrate, trace
from allocator.calibration.data import read_sequences
from allocator.calibration.model import StreamedModel
from allocator.calibration.routing import layer_routing
from allocator.calibration.spill import Spill
from profiles.errors import DataError, SpecError
from profiles.loads import read_trace
from profiles.models import model_from_config
from tests.allocator.calibration import tiny


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, tiny.token_ids(256))
    return path


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    sizes = ("--sequence-length", "32", "--num-sequences", "8", "--quiet")
    return ["--model", str(model), "--data", str(data), "--out", str(out), *sizes, *more]


def with_tokenizer(folder: Path, target: Path, words: int) -> Path:
    """A copy of a checkpoint with a tokenizer of so many words: w0, w1, ..."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(target)
    return target


def test_a_trace_is_what_the_routers_chose(
    checkpoints: dict[str, Path], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.json"
    folder = checkpoints["qwen2_moe"]
    assert trace.main(arguments(folder, ids, out)) == 0
    assert "256 tokens (ids.npy, 8 x 32 tokens) through 2 MoE layers" in capsys.readouterr().out
    loads = read_trace(out)
    assert set(loads) == {1, 2}
    assert all(load.total == 2 * 256 for load in loads.values())
    model = StreamedModel(folder)
    hidden = model.embed(torch.from_numpy(tiny.token_ids(256)).view(8, 32))
    chosen: list[torch.Tensor] = []
    for index in range(3):
        layer = model.layer(index)
        if layer.block is not None:
            gate = layer.block.get_submodule("gate")
            gate.register_forward_hook(lambda _, __, output: chosen.append(output))
        hidden = model.run(layer, hidden)
    details = pq.read_table(tmp_path / "trace.routing.parquet").to_pandas()
    for number, layer_index in enumerate((1, 2)):
        _, weights, index = chosen[number]
        counts = np.bincount(index.flatten().numpy(), minlength=8)
        assert loads[layer_index].tokens_per_expert == tuple(counts.tolist())
        rows = details[details["layer"] == layer_index]
        assert rows["tokens"].tolist() == counts.tolist()
        mass = np.bincount(index.flatten().numpy(), weights.flatten().double().numpy(), minlength=8)
        np.testing.assert_allclose(rows["weight_mass"], mass, rtol=1e-5)
        together = np.stack(rows["chosen_with"].tolist())
        assert (together == together.T).all()
        pairs = [set(row) for row in index.tolist()]
        assert together[2, 5] == sum({2, 5} <= pair for pair in pairs)
        assert (together.sum(1) == 2 * counts).all()  # with itself and with one other
    assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"


def test_counts_of_a_known_routing() -> None:
    index = torch.tensor([[0, 1], [1, 2], [1, 0]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    found = layer_routing(index, weights, 4)
    assert found.tokens.tolist() == [2, 3, 1, 0]
    np.testing.assert_allclose(found.weight_mass, [0.75, 1.75, 0.5, 0.0])
    assert found.chosen_with.tolist() == [[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_a_trace_as_parquet_and_json(
    checkpoints: dict[str, Path], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "t.parquet", tmp_path / "skew.svg"
    few = tmp_path / "few.npy"
    np.save(few, np.array([3, 3, 3]))
    assert trace.main(arguments(checkpoints["olmoe"], few, out, "--plot", str(plot), "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["notes"] == [
        "few.npy has 3 tokens, fewer than one sequence; it is taken as one",
        "few.npy gives 1 sequences of 3 tokens, not 8",
    ]
    assert len(printed["layers"]["0"]["idle"]) >= 2  # three tokens reach at most six of eight experts
    assert set(read_trace(out)) == {0, 1, 2}
    assert b"<svg" in plot.read_bytes()


def test_a_sensitivity_is_written_that_the_allocator_takes(
    checkpoints: dict[str, Path], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.parquet"
    folder = checkpoints["qwen2_moe"]
    names = "w4a16_g128_asym,w2a16_g128_asym,w8a16_g-1_sym"
    assert calibrate.main(arguments(folder, ids, out, "--schemes", names, "--measure", "block-l2")) == 0
    printed = capsys.readouterr().out
    assert "36 linears, block-l2 of gptq+clip, ids.npy, 8 x 32 tokens" in printed
    assert "fewer tokens than inputs have features" in printed
    sensitivity = Sensitivity.read(out)
    assert {scheme.name for scheme in sensitivity.schemes} == set(names.split(","))
    report = json.loads((tmp_path / "s.report.json").read_text())
    assert set(report["layers"]) == {"1", "2"}
    assert report["layers"]["1"]["few_tokens"]
    assert not list(tmp_path.glob(".*.partial"))
    allocation = allocate(sensitivity, None, Budget(avg_weight_bits=5.0), shape=model_from_config(folder))
    assert allocation.avg_weight_bits <= 5.0
    assert len(allocation.assignment) == 36


def test_a_text_is_read_with_the_checkpoints_tokenizer(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tokenizer(checkpoints["olmoe"], tmp_path / "model", tiny.VOCAB)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in tiny.token_ids(256)))
    out = tmp_path / "s.parquet"
    more = ("--schemes", "w4a16_g128_sym", "--json", "--method", "rtn", "--no-clip")
    assert calibrate.main(arguments(folder, text, out, *more)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["data"] == "text.txt, 8 x 32 tokens"
    assert printed["metric"] == "fisher of rtn"
    read = read_sequences(text, folder, vocab_size=tiny.VOCAB, length=32, number=8)
    assert torch.equal(read.tokens, torch.from_numpy(tiny.token_ids(256)).view(8, 32))


def test_more_data_than_asked_is_sampled_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    first, again, other = (
        read_sequences(path, tmp_path, vocab_size=1000, length=10, number=5, seed=seed).tokens for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[:, 0] % 10 == 0).all()
    assert (first.diff(dim=1) == 1).all()
    assert (first[:, 0].diff() > 0).all()
    short = read_sequences(path, tmp_path, vocab_size=1000, length=10, number=5, max_length=8)
    assert short.tokens.shape == (5, 8)
    assert short.notes == ("the model has positions for 8 tokens; sequences are as long, not 10",)
    whole = tmp_path / "rows.npy"
    np.save(whole, np.arange(60).reshape(3, 20))
    read = read_sequences(whole, tmp_path, vocab_size=60, length=30, number=3)
    assert torch.equal(read.tokens, torch.arange(60).view(3, 20))
    assert read.notes == ("rows.npy holds sequences of 20 tokens; none is longer",)


def refusals(tmp_path: Path, folder: Path) -> dict[str, tuple[list[str], str]]:
    """By name: arguments, and part of the sentence."""
    good = tmp_path / "good.npy"
    np.save(good, tiny.token_ids(256))
    beyond, empty, floats, cube = (tmp_path / f"{name}.npy" for name in ("beyond", "empty", "floats", "cube"))
    np.save(beyond, np.array([1, 2, tiny.VOCAB]))
    np.save(empty, np.array([], dtype=np.int64))
    np.save(floats, np.zeros(5))
    np.save(cube, np.zeros((2, 2, 2), dtype=int))
    broken = tmp_path / "broken.npy"
    broken.write_bytes(good.read_bytes()[:100])
    blank, latin, text, other = (tmp_path / f"{name}.txt" for name in ("blank", "latin", "text", "other"))
    other.write_text("some words that the tokenizer does not know " * 20)
    blank.write_text(" \n")
    latin.write_bytes(b"\xff\xfe\xe9")
    text.write_text("w1 w2 w3 w500 " * 50)
    foreign = with_tokenizer(folder, tmp_path / "foreign", 1000)
    damaged = with_tokenizer(folder, tmp_path / "damaged", 100)
    (damaged / "tokenizer.json").write_text("{")
    out = tmp_path / "out.parquet"
    return {
        "no model": (arguments(tmp_path / "none", good, out), "no such folder"),
        "no data": (arguments(folder, tmp_path / "none.txt", out), "no such file; --data takes"),
        "a folder for out": (arguments(folder, good, tmp_path), "it is a folder; name a file"),
        "no folder for out": (arguments(folder, good, tmp_path / "no" / "o.parquet"), "its folder does not exist"),
        "beyond the vocabulary": (
            arguments(folder, beyond, out),
            "token id 128 is outside the model's vocabulary of 128",
        ),
        "no tokens": (arguments(folder, empty, out), "0 tokens; at least 2 are needed"),
        "floats": (arguments(folder, floats, out), "it has float64 [5]"),
        "three dimensions": (arguments(folder, cube, out), "it has int64 [2, 2, 2]"),
        "truncated": (arguments(folder, broken, out), "not a readable .npy"),
        "blank": (arguments(folder, blank, out), "an empty text"),
        "not a text": (arguments(folder, latin, out), "not a UTF-8 text"),
        "no tokenizer": (arguments(folder, text, out), "no tokenizer in the checkpoint"),
        "foreign tokenizer": (
            arguments(foreign, text, out),
            "the tokenizer does not match the model: it gives token 500",
        ),
        "tokenizer of another language": (
            arguments(foreign, other, out),
            "the tokenizer does not match the text: it knows no token for 100% of other.txt",
        ),
        "damaged tokenizer": (arguments(damaged, text, out), "its tokenizer cannot be read"),
        "no such seed": (arguments(folder, good, out, "--seed", "-1"), "seed -1: a number from 0"),
        "no sequences": (arguments(folder, good, out, "--num-sequences", "0"), "at least 1 of 2 are needed"),
    }


@pytest.mark.parametrize("command", [trace, calibrate], ids=["trace", "calibrate"])
def test_bad_input_is_one_sentence(
    command: object, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (given, sentence) in refusals(tmp_path, checkpoints["olmoe"]).items():
        assert command.main(given) == 2, name  # type: ignore[attr-defined]
        printed = capsys.readouterr()
        assert printed.out == "", name
        assert sentence in printed.err, name
        assert printed.err.startswith("error: "), name
        assert len(printed.err.strip().splitlines()) == 1, name
        assert not (tmp_path / "out.parquet").exists(), name


def test_bad_options_of_calibrate(
    checkpoints: dict[str, Path], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.parquet"
    for more, sentence in (
        (("--measure", "guess"), "unknown measure 'guess'"),
        (("--schemes", "w5a16_g128_sym"), "w5a16_g128_sym"),
        (("--damping", "-1"), "damping -1.0 must be"),
        (("--max-rows", "0"), "max rows 0"),
    ):
        assert calibrate.main(arguments(checkpoints["olmoe"], ids, out, *more)) == 2
        assert sentence in capsys.readouterr().err
    assert trace.main(arguments(checkpoints["olmoe"], ids, tmp_path / "t.txt")) == 2
    assert "a trace ends in .json or .parquet" in capsys.readouterr().err
    assert trace.main(arguments(checkpoints["olmoe"], ids, tmp_path / "t.json", "--plot", "x.xyz")) == 2
    assert "a picture ends in" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(
    checkpoints: dict[str, Path], ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trace.main(arguments(checkpoints["olmoe"], ids, tmp_path / "t.json", "--device", "cuda")) == 2
    assert "sees no GPU here" in capsys.readouterr().err


def test_batch_size_must_be_positive(checkpoints: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    assert trace.main(arguments(checkpoints["olmoe"], ids, tmp_path / "t.json", "--batch-size", "0")) == 2


def test_lengths_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="128 sequences of 1 tokens"):
        read_sequences(tmp_path / "x.npy", tmp_path, vocab_size=10, length=1)
    with pytest.raises(DataError, match="no such file"):
        read_sequences(tmp_path / "x.npy", tmp_path, vocab_size=10)


def test_without_torch_the_command_says_what_to_install() -> None:
    program = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('torch', 'transformers') else find(name, *a)\n"
        "from allocator.calibrate import main\n"
        "sys.exit(main(['--model', 'x', '--data', 'y', '--out', 'z']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: allocator.calibrate needs torch, transformers, not installed here: pip install 'bitile[models]'\n"
    )


def test_an_interruption_and_a_full_gpu_are_said(
    checkpoints: dict[str, Path],
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments(checkpoints["olmoe"], ids, tmp_path / "t.json")
    for error, code, sentence in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            2,
            "give fewer sequences at once with --batch-size",
        ),
    ):

        def stop(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(StreamedModel, "layer", stop)
        assert trace.main(given) == code
        printed = capsys.readouterr().err
        assert sentence in printed
        assert len(printed.strip().splitlines()) == 1


def test_what_is_spilled_comes_back(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    first = [torch.randn(2, 3, 4).to(torch.bfloat16), torch.randn(1, 3, 4).to(torch.bfloat16)]
    spill.put(0, first)
    spill.put(1, [torch.arange(6.0).view(2, 3).T])
    assert all(torch.equal(a, b) for a, b in zip(spill.take(0), first, strict=True))
    assert torch.equal(spill.take(1)[0], torch.arange(6.0).view(2, 3).T)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="layers' inputs cannot be kept there"):
        Spill(tmp_path / "gone").put(0, first)
