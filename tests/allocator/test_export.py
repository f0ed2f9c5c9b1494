"""Exports: what a target can have, the best it can be told, and configurations that say exactly the allocation."""

import itertools
import json
import re
from pathlib import Path

import pytest

from allocator import Allocation, Budget, Granularity, Options, allocate
from allocator.export import Engine, Form, Target, compressed_tensors, gptq, modelopt, project
from allocator.export.__main__ import main
from allocator.export.names import Names, names_of
from allocator.export.targets import FORMS_OF, MODELOPT_ALGORITHMS
from profiles import schemes
from profiles.errors import SpecError
from profiles.models import Linear, LinearId
from profiles.schemes import KERNEL_SCHEMES, QuantScheme
from tests.allocator.tables import SCHEMES, a_cost_table, a_sensitivity

MIXTRAL = names_of("mixtral-8x7b", None)
QWEN = Names(shared="shared_expert")


@pytest.fixture(scope="module")
def native() -> Allocation:
    return allocate(a_sensitivity(), a_cost_table(), Budget(avg_weight_bits=6.0))


def uniform_in_layers(names: dict[int, str]) -> Allocation:
    """One scheme a layer, of 4 experts and a shared one."""
    assignment = {
        LinearId(layer=layer, expert=expert, linear=linear): schemes.parse(scheme)
        for layer, scheme in names.items()
        for expert in range(-1, 4)
        for linear in Linear
    }
    base = allocate(a_sensitivity(), None, Budget(avg_weight_bits=6.0)).to_json()
    rows = [[i.layer, i.expert, i.linear.value, scheme.name] for i, scheme in assignment.items()]
    return Allocation.from_json(base | {"assignment": rows})


@pytest.mark.parametrize("engine", Engine)
def test_projection_is_the_best_that_can_be_told(engine: Engine, native: Allocation) -> None:
    for form in FORMS_OF[engine]:
        target = Target(form=form, engine=engine)
        possible, refused = target.split([schemes.parse(name) for name in SCHEMES])
        assert all(why for why in refused.values())
        if {s.name for s in possible} == {"w16a16"}:
            continue
        loss = a_sensitivity().frame().pivot_table(index="layer", columns="scheme", values="loss", aggfunc="sum")
        budget = Budget(avg_weight_bits=8.1)
        found = project(allocate(a_sensitivity(), a_cost_table(), budget), target, a_sensitivity(), a_cost_table())
        best = float("inf")
        for choice in itertools.product(possible, repeat=len(loss)):
            bits = [scheme.bits_per_weight(2048) for scheme in choice]
            if sum(bits) / len(bits) <= 8.05:  # channel scales of `down` (k = 1024) weigh a little more
                best = min(best, sum(loss.loc[layer, s.name] for layer, s in zip(loss.index, choice, strict=True)))
        assert found.exported.predicted_loss == pytest.approx(best, rel=1e-9)
        assert found.exported.avg_weight_bits <= 8.1
        assert found.loss_ratio is None or found.loss_ratio >= 1 - 1e-12
        assert set(found.exported.assignment.values()) <= set(possible)


def test_what_can_be_said_is_exported_as_it_is(native: Allocation) -> None:
    assert project(native, Target(form=Form.NATIVE), a_sensitivity()).exported is native
    target = Target(form=Form.COMPRESSED_TENSORS)
    tied = allocate(a_sensitivity(), None, Budget(avg_weight_bits=6.0), options=Options(granularity=Granularity.LAYER))
    assert project(tied, target, a_sensitivity()).exported is tied
    assert project(native, target, a_sensitivity(), a_cost_table()).exported.granularity is Granularity.LAYER


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES, ids=lambda scheme: scheme.name)
def test_compressed_tensors_reads_every_scheme(scheme: QuantScheme) -> None:
    package = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.utils import is_match

    other = "w8a16_g-1_sym"
    content = compressed_tensors.config(uniform_in_layers({0: scheme.name, 7: other, 11: "w16a16"}), QWEN)
    read = package.QuantizationConfig.model_validate(content)
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(8, 8)

    def scheme_of(module: str) -> str | None:
        if is_match(module, linear, read.ignore):
            return None
        names = [g for g, group in read.config_groups.items() if is_match(module, linear, group.targets)]
        assert len(names) == 1, module
        found = read.config_groups[names[0]]
        assert found.format == content["config_groups"][names[0]]["format"]
        spec = found.weights
        inputs = found.input_activations
        group = spec.group_size or -1
        return (
            f"w{spec.num_bits}a{inputs.num_bits if inputs else 16}_g{group}_{'sym' if spec.symmetric else 'asym'}"
            + ("_e4m3" if inputs and inputs.type == "float" else "")
        )

    expected = None if scheme.weights is None else scheme.name
    for parent in ("experts.0", "experts.3", "shared_expert"):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert scheme_of(f"model.layers.0.mlp.{parent}.{name}") == expected
            assert scheme_of(f"model.layers.7.mlp.{parent}.{name}") == other
            assert scheme_of(f"model.layers.11.mlp.{parent}.{name}") is None
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.7.mlp.gate", "model.layers.7.mlp.up_proj", "lm_head"):
        assert scheme_of(name) is None
    vllm = [f"model.layers.7.mlp.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    assert {scheme_of(name) for name in vllm} == {other}  # what vLLM asks for of a fused layer


def test_gptq_rules_say_the_allocation() -> None:
    some = tuple(s for s in map(schemes.parse, SCHEMES) if s.activation_bits == 16)
    native = allocate(a_sensitivity(), None, Budget(avg_weight_bits=4.0), options=Options(schemes=some))
    target = Target(form=Form.GPTQ)
    assert project(native, target, a_sensitivity()).exported is native
    content = gptq.config(native, QWEN)
    for block, scheme in native.assignment.items():
        for module in QWEN.modules(block):
            said = gptq.settings_of(content, module)
            expected = {"bits": scheme.weight_bits, "group_size": scheme.group_size, "sym": scheme.is_symmetric}
            assert said == (None if scheme.weights is None else expected)
    assert gptq.settings_of(content, "model.layers.0.self_attn.o_proj") is None
    assert gptq.settings_of(content, "lm_head") is None


def test_modelopt_names_every_module() -> None:
    names = list(MODELOPT_ALGORITHMS)
    native = uniform_in_layers(dict(enumerate([*names, "w16a16"])))
    said = modelopt.config(native, QWEN)["quantization"]
    assert len(said["quantized_layers"]) == len(names) * 5 * 3
    for i, name in enumerate(names):
        entry = said["quantized_layers"][f"model.layers.{i}.mlp.shared_expert.up_proj"]
        assert entry["quant_algo"] == MODELOPT_ALGORITHMS[name]
        assert entry.get("group_size", -1) == schemes.parse(name).group_size
    assert f"model.layers.{len(names)}.mlp.experts.3.down_proj" in said["exclude_modules"]


def test_mixtral_names() -> None:
    block = LinearId(layer=3, expert=5, linear=Linear.GATE_UP)
    assert MIXTRAL.modules(block) == (
        "model.layers.3.block_sparse_moe.experts.5.w1",
        "model.layers.3.block_sparse_moe.experts.5.w3",
    )
    pattern = MIXTRAL.pattern(3, [5], [Linear.DOWN])
    assert re.match(pattern, "model.layers.3.block_sparse_moe.experts.5.w2")
    assert not re.match(pattern, "model.layers.3.block_sparse_moe.experts.55.w2")
    assert not re.match(pattern, "model.layers.3.block_sparse_moe.experts.5.w1")


def test_sglang_gets_one_weight_only_scheme() -> None:
    some = [schemes.parse(name) for name in ("w4a16_g128_sym", "w8a16_g-1_sym", "w8a8_g-1_sym")]
    target = Target(form=Form.COMPRESSED_TENSORS, engine=Engine.SGLANG)
    assert [{s.name for s in one} for one in target.alternatives(some)] == [
        {"w8a8_g-1_sym", "w4a16_g128_sym"},
        {"w8a8_g-1_sym", "w8a16_g-1_sym"},
    ]


@pytest.fixture
def files(tmp_path: Path, native: Allocation) -> list[str]:
    native.write(tmp_path / "a.json")
    a_sensitivity().write(tmp_path / "s.parquet")
    a_cost_table().write(tmp_path / "c.parquet")
    given = ("--allocation", "a.json"), ("--sensitivity", "s.parquet"), ("--cost", "c.parquet"), ("--out", "out.json")
    return [text for option, name in given for text in (option, str(tmp_path / name))]


def test_command_says_then_prices(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    assert main([*files, "--format", "compressed-tensors"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("compressed-tensors: one scheme a layer; it can have")
    assert "times the native one" in printed
    assert json.loads(Path(files[-1]).read_text())["quant_method"] == "compressed-tensors"
    budget = Budget(avg_weight_bits=8.1)
    allocate(a_sensitivity(), None, budget).write(files[1])
    assert main([*files, "--target", "vllm", "--json"]) == 0
    price = json.loads(capsys.readouterr().out)
    assert "experts need symmetric weights" in price["refused"]["w4a16_g128_asym"]
    assert price["loss_ratio"] >= 1
    assert main([*files, "--format", "native"]) == 0
    capsys.readouterr()
    assert main([*files, "--format", "gptq", "--json"]) == 0
    assert "no weights: quantise with GPTQModel" in json.loads(capsys.readouterr().out)["written"]
    assert main([*files, "--format", "native"]) == 0
    assert Allocation.read(files[-1]) == Allocation.read(files[1])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--target", "trtllm", "--format", "gptq"], "trtllm does not load mixed precisions from gptq; it does from"),
        (["--target", "vllm", "--format", "native"], "vllm does not load bitile's own form"),
        (["--target", "vllm"], "the budget cannot be met"),
        (["--weights", "--format", "modelopt"], "not modelopt; without it there is a configuration, no weights"),
        (["--out", "/nowhere/x.json"], "its folder does not exist"),
        (["--allocation", "nothing.json"], "no such file"),
    ],
)
def test_mistakes_are_one_sentence(
    files: list[str], more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    allocate(a_sensitivity(), None, Budget(avg_weight_bits=3.0)).write(files[1])
    assert main([*files, *more]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SpecError, match="names of gpt-oss-20b's experts are not known"):
        names_of("gpt-oss-20b", None)
