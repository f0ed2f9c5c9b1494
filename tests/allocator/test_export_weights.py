"""Quantised checkpoints: what compressed-tensors reads from them, numerically, for every scheme that it can be told."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from safetensors.torch import load_file, save_file  # noqa: E402

from allocator import Allocation, Budget, Granularity, Options, Sensitivity, allocate  # noqa: E402
from allocator.calibration.data import read_sequences  # noqa: E402
from allocator.calibration.model import StreamedModel  # noqa: E402
from allocator.calibration.quantizer import Method, Quantizer  # noqa: E402
from allocator.calibration.streams import measure_allocations  # noqa: E402
from allocator.export import compressed_tensors  # noqa: E402
from allocator.export.__main__ import main  # noqa: E402
from allocator.export.names import names_of  # noqa: E402
from allocator.export.weights import read_back, split, stored, write_checkpoint  # noqa: E402
from kernel_gen.formats import dequantize, quantize  # noqa: E402
from profiles import schemes  # noqa: E402
from profiles.errors import SpecError  # noqa: E402
from profiles.models import Linear, LinearId  # noqa: E402
from profiles.schemes import KERNEL_SCHEMES, QuantScheme  # noqa: E402
from tests.allocator.calibration import tiny  # noqa: E402
from tests.allocator.test_export import QWEN, uniform_in_layers  # noqa: E402

QUANTISED = [scheme for scheme in KERNEL_SCHEMES if scheme.weights is not None]
LAYERS = ("w4a16_g-1_asym", "w8a8_g-1_sym")


@pytest.mark.parametrize("scheme", QUANTISED, ids=lambda scheme: scheme.name)
def test_every_scheme_is_read_as_it_was_quantised(scheme: QuantScheme) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    weights = torch.randn(1, 24, 384, generator=torch.Generator().manual_seed(0))
    content = compressed_tensors.config(uniform_in_layers({0: scheme.name}), QWEN)
    config = QuantizationConfig.model_validate(content)
    whole = quantize(weights, scheme)
    for part, name in zip(split(whole, 2), ("gate_proj", "up_proj"), strict=True):
        found = read_back(config, content, f"model.layers.0.mlp.experts.1.{name}", stored(part))
        assert torch.equal(found, dequantize(part)[0].to(found.dtype))
    together = torch.cat([dequantize(part) for part in split(whole, 2)], dim=1)
    assert torch.equal(together, dequantize(whole))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tiny.save(tiny.CONFIGS["qwen2_moe"], tmp_path_factory.mktemp("models") / "tiny")
    np.save(folder / "calibrate.npy", tiny.token_ids(512, 1).reshape(8, 64))
    np.save(folder / "held_out.npy", tiny.token_ids(512, 2).reshape(8, 64))
    return folder


def an_allocation(model: StreamedModel, names: tuple[str, ...]) -> tuple[Allocation, Sensitivity]:
    """Layer i's experts in names[i], by losses that make it so."""
    shape = model.shape
    losses = {
        (LinearId(layer=layer, expert=expert, linear=linear), schemes.parse(name)): 0.0 if name == names[i] else 1.0
        for i, layer in enumerate(model.moe_layers)
        for expert in range(-1 if shape.num_shared_experts else 0, shape.num_experts)
        for linear in Linear
        for name in {*names, "w16a16"}
    }
    made = Sensitivity.from_losses(losses, model=shape.name, metric="m", data="d", num_samples=1, seed=0)
    options = Options(granularity=Granularity.LAYER)
    return allocate(made, None, Budget(avg_weight_bits=16.5), shape=shape, options=options), made


def decompressed(checkpoint: Path, exported: Path, modules: list[str], out: Path) -> Path:
    """A plain checkpoint of what the package reads; everything else must be as it was."""
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((exported / "config.json").read_text())
    content = config.pop("quantization_config")
    assert config == json.loads((checkpoint / "config.json").read_text())
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: tensor for file in set(index.values()) for name, tensor in load_file(exported / file).items()}
    assert set(index) == set(tensors)
    package, plain = QuantizationConfig.model_validate(content), {}
    for module in modules:
        prefix = f"{module}."
        state = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        plain[f"{module}.weight"] = read_back(package, content, module, state).float().contiguous()
    exact = {name: t for name, t in load_file(checkpoint / "model.safetensors").items() if name not in plain}
    assert set(tensors) == set(exact)
    assert all(torch.equal(tensors[name], exact[name]) for name in exact)
    out.mkdir()
    save_file({**exact, **plain}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return out


def exported(checkpoint: Path, schemes_of_layers: tuple[str, ...], tmp_path: Path):
    """(model, calibration, allocation, quantiser, modules) of what lies in tmp_path/out and tmp_path/plain."""
    model = StreamedModel(checkpoint)
    data = read_sequences(checkpoint / "calibrate.npy", checkpoint, vocab_size=model.vocab_size, length=64, number=8)
    allocation, _ = an_allocation(model, schemes_of_layers)
    quantizer = Quantizer(method=Method.GPTQ, clip=True)
    names = names_of(allocation.model, checkpoint)
    written = write_checkpoint(model, data, allocation, names, quantizer, tmp_path / "out", batch_size=8)
    modules = [module for block in allocation.assignment for module in names.modules(block)]
    assert written.num_modules == len(modules)
    decompressed(checkpoint, tmp_path / "out", modules, tmp_path / "plain")
    return model, data, allocation, quantizer


def test_the_checkpoint_is_what_was_measured(checkpoint: Path, tmp_path: Path) -> None:
    """Its weights as the package decompresses them, in a plain model, do what the allocation was measured to do."""
    model, data, allocation, quantizer = exported(checkpoint, ("w4a16_g-1_asym", "w2a16_g-1_asym"), tmp_path)
    held_out = read_sequences(checkpoint / "held_out.npy", checkpoint, vocab_size=model.vocab_size, length=64, number=8)
    measured = measure_allocations(
        model, held_out.tokens, data.tokens, [allocation.assignment], quantizer, batch_size=8
    )
    quantised = StreamedModel(tmp_path / "plain")
    own = measure_allocations(quantised, held_out.tokens, data.tokens, [{}], quantizer, batch_size=8)
    assert measured.allocations[0].perplexity != pytest.approx(measured.exact_perplexity, rel=1e-4)
    assert own.exact_perplexity == pytest.approx(measured.allocations[0].perplexity, rel=1e-5)


def test_transformers_loads_it(checkpoint: Path, tmp_path: Path) -> None:
    """One symmetric scheme: transformers' own loader has one for all experts, without zero points."""
    from transformers import AutoModelForCausalLM

    exported(checkpoint, ("w4a16_g-1_sym", "w4a16_g-1_sym"), tmp_path)
    ids = torch.from_numpy(np.load(checkpoint / "held_out.npy")[:2])
    logits = []
    for folder in (tmp_path / "out", tmp_path / "plain", checkpoint):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(loaded(ids).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-4 * float(logits[1].abs().max()))
    assert float((logits[1] - logits[2]).abs().max()) > 1e-2 * float(logits[1].abs().max())


def command(checkpoint: Path, tmp_path: Path, names: tuple[str, ...], *more: str) -> list[str]:
    allocation, losses = an_allocation(StreamedModel(checkpoint), names)
    allocation.write(tmp_path / "a.json")
    losses.write(tmp_path / "s.parquet")
    return [
        "--allocation", str(tmp_path / "a.json"), "--sensitivity", str(tmp_path / "s.parquet"), "--format",
        "compressed-tensors", "--weights", "--model", str(checkpoint), "--data", str(checkpoint / "calibrate.npy"),
        "--sequence-length", "64", "--num-sequences", "8", "--batch-size", "8", "--out", str(tmp_path / "out"), *more,
    ]  # fmt: skip


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(checkpoint, tmp_path, LAYERS, "--held-out", str(checkpoint / "held_out.npy"))
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["weights"]["mean_kl"] > 0
    assert printed["loss_ratio"] is None or printed["loss_ratio"] == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert not list(tmp_path.glob(".out*"))
    assert main(arguments) == 2  # the folder is there
    assert "there is something already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--format", "gptq"), "--weights writes compressed-tensors checkpoints, not gptq"),
        (("--model", "nowhere"), "--weights needs --model DIR"),
        (("--data", "nothing.txt"), "--data: no file nothing.txt"),
    ],
)
def test_mistakes_are_one_sentence(
    checkpoint: Path, tmp_path: Path, more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(checkpoint, tmp_path, LAYERS), *more]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_the_form_cannot_say_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = StreamedModel(checkpoint)
    allocation, _ = an_allocation(model, LAYERS)
    data = read_sequences(checkpoint / "calibrate.npy", checkpoint, vocab_size=model.vocab_size, length=64, number=8)
    with pytest.raises(SpecError, match="no form for rotated inputs"):
        write_checkpoint(model, data, allocation, QWEN, Quantizer(rotate=True), tmp_path / "out")
    grouped, _ = an_allocation(model, ("w4a16_g128_asym", *LAYERS[1:]))
    with pytest.raises(SpecError, match="needs inputs in whole groups of 128"):
        write_checkpoint(model, data, grouped, QWEN, Quantizer(), tmp_path / "out")
