import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from allocator.calibration.adapters import FusedExperts, UnknownArchitectureError, adapters, register
from allocator.calibration.checkpoint import SINGLE, Checkpoint
from allocator.calibration.model import StreamedModel
from profiles.errors import DataError, SpecError, UserError
from tests.allocator.calibration import tiny


def streamed_logits(model: StreamedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = model.embed(tokens)
        for index in range(model.num_layers):
            hidden = model.run(model.layer(index), hidden)
        return model.logits(hidden)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_layer_by_layer_gives_what_the_whole_model_gives(
    name: str, checkpoints: dict[str, Path], tokens: Tensor
) -> None:
    whole = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(tokens).logits
    got = streamed_logits(StreamedModel(checkpoints[name]), tokens)
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_every_adapter_is_tested() -> None:
    assert set(adapters()) == set(tiny.CONFIGS)


def test_only_the_layers_asked_for_are_kept(checkpoints: dict[str, Path], tokens: Tensor) -> None:
    model = StreamedModel(checkpoints["olmoe"], layers_kept=2)
    first = model.layer(0)
    assert model.layer(1) is model.layer(1)
    assert model.layer(0) is first
    model.layer(2)  # layer 1 was used longest ago
    assert model.layer(0) is first
    assert sum(parameter.is_meta for parameter in model._layers[1].parameters()) == len(
        list(model._layers[1].parameters())
    )


def rewrite(folder: Path, target: Path, change: dict[str, Tensor]) -> Path:
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: tensor.contiguous() for name, tensor in change.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("form", ["3d", "gate and up together"])
def test_other_forms_on_disk_are_the_same_model(
    form: str, checkpoints: dict[str, Path], tokens: Tensor, tmp_path: Path
) -> None:
    folder = checkpoints["qwen3_moe"]
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {p: [tensors.pop(f"{stem}.{e}.{p}_proj.weight") for e in range(8)] for p in ("gate", "up", "down")}
        gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        if form == "3d":
            tensors[f"{stem}.gate_up_proj"] = torch.stack(gate_up)
            tensors[f"{stem}.down_proj"] = torch.stack(parts["down"])
        else:
            for e in range(8):
                tensors[f"{stem}.{e}.gate_up_proj.weight"] = gate_up[e]
                tensors[f"{stem}.{e}.down_proj.weight"] = parts["down"][e]
    other = StreamedModel(rewrite(folder, tmp_path / "other", tensors))
    torch.testing.assert_close(
        streamed_logits(other, tokens), streamed_logits(StreamedModel(folder), tokens), atol=0, rtol=0
    )


def test_a_tied_head_is_the_embedding(tokens: Tensor, tmp_path: Path) -> None:
    config = transformers.OlmoeConfig(
        **tiny.SIZES, intermediate_size=32, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=True
    )
    folder = tiny.save(config, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(tokens).logits
    torch.testing.assert_close(streamed_logits(StreamedModel(folder), tokens), expected, atol=2e-5, rtol=1e-5)


def test_routing_keeps_its_precision(checkpoints: dict[str, Path]) -> None:
    layer = StreamedModel(checkpoints["deepseek_v3"], dtype=torch.bfloat16).layer(1)
    assert layer.block is not None
    gate = layer.block.get_submodule("gate")
    assert gate.get_buffer("e_score_correction_bias").dtype == torch.float32
    kept = transformers.DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict  # later releases keep the weight too
    assert gate.get_parameter("weight").dtype == (torch.float32 if "gate.weight" in kept else torch.bfloat16)
    attention = layer.module.get_submodule("self_attn.o_proj")
    assert attention.get_parameter("weight").dtype == torch.bfloat16


def test_shards_are_one_model(tokens: Tensor, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny.save(tiny.CONFIGS["mixtral"], tmp_path / "sharded", shard="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    torch.testing.assert_close(
        streamed_logits(StreamedModel(folder), tokens),
        streamed_logits(StreamedModel(checkpoints["mixtral"]), tokens),
        atol=0,
        rtol=0,
    )
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"1 of \d+ shards missing \({lost.name}\)"):
        Checkpoint(folder)
    lost.write_bytes((tmp_path / "elsewhere").read_bytes()[:1000])
    with pytest.raises(DataError, match=f"{lost.name}: not a readable safetensors file"):
        Checkpoint(folder)


def test_an_unknown_architecture_is_told_what_an_adapter_needs(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**tiny.SIZES, intermediate_size=32)
    folder = tiny.save(config, tmp_path / "llama")
    with pytest.raises(UnknownArchitectureError, match=r"'llama' .*needs the MoE block.*register\(\)"):
        StreamedModel(folder)


class ListBlock(nn.Module):
    """An MoE block as older and foreign code has it: a list of modules, called one by one."""

    def __init__(self, config: transformers.OlmoeConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(OlmoeMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        weights, chosen = torch.topk(self.gate(x).softmax(-1), 2, dim=-1)
        y = torch.zeros_like(x)
        for token in range(len(x)):
            for slot in range(2):
                y[token] += weights[token, slot] * self.experts[chosen[token, slot]](x[token])
        return y.view_as(hidden_states)


class OlmoeMLP(nn.Module):
    def __init__(self, config: transformers.OlmoeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class ListConfig(transformers.OlmoeConfig):
    model_type = "list_moe"


class ListForCausalLM(transformers.OlmoeForCausalLM):
    config_class = ListConfig

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListBlock(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListAdapter(FusedExperts):
    def install(self, block: nn.Module, routed: nn.Module, shared: nn.Module | None) -> None:
        def forward(hidden_states: Tensor) -> Tensor:
            x = hidden_states.flatten(0, 1)
            weights, chosen = torch.topk(block.gate(x).softmax(-1), 2, dim=-1)
            return routed(x, chosen, weights).view_as(hidden_states)

        block.experts, block.forward = routed, forward


def test_an_adapter_for_lists_of_modules_can_be_registered(
    tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers.AutoConfig.register("list_moe", ListConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(ListConfig, ListForCausalLM, exist_ok=True)
    folder = tmp_path / "lists"
    folder.mkdir()
    torch.manual_seed(0)
    whole = ListForCausalLM(ListConfig(**tiny.SIZES, intermediate_size=32, num_experts=8, num_experts_per_tok=2)).eval()
    whole.config.to_json_file(folder / "config.json")
    save_file({name: tensor.contiguous() for name, tensor in whole.state_dict().items()}, folder / "model.safetensors")
    with pytest.raises(UnknownArchitectureError, match="list_moe"):
        StreamedModel(folder)
    monkeypatch.setattr("allocator.calibration.adapters._ADAPTERS", [])
    register(ListAdapter(model_types=("list_moe",)))
    with torch.no_grad():
        expected = whole(tokens).logits
    torch.testing.assert_close(streamed_logits(StreamedModel(folder), tokens), expected, atol=2e-5, rtol=1e-5)


def test_a_damaged_checkpoint_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = checkpoints["qwen3_moe"]
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    weights = tensors[name]
    for kind in (torch.int8, torch.float8_e4m3fn):
        tensors[name] = weights.to(kind)
        with pytest.raises(DataError, match=rf"{name} holds (int8|float8_e4m3fn); bf16, fp16 or fp32 is needed"):
            StreamedModel(rewrite(folder, tmp_path / str(kind), tensors)).layer(1)
    tensors[name] = weights
    tensors[name][0, 0] = torch.nan
    with pytest.raises(DataError, match=rf"{name} holds a NaN"):
        StreamedModel(rewrite(folder, tmp_path / "nan", tensors)).layer(1)
    del tensors[name]
    with pytest.raises(DataError, match=f"no tensor {name}"):
        StreamedModel(rewrite(folder, tmp_path / "less", tensors)).layer(1)
    del tensors["model.layers.0.input_layernorm.weight"]
    with pytest.raises(DataError, match=r"layer 0 has no tensor input_layernorm\.weight"):
        StreamedModel(rewrite(folder, tmp_path / "fewer", tensors)).layer(0)
    del tensors["model.norm.weight"]
    with pytest.raises(DataError, match=r"no tensor model\.norm\.weight"):
        StreamedModel(rewrite(folder, tmp_path / "fewest", tensors))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"vocab_size": 256},
            r"weight is \[128, 64\] in the checkpoint, and config\.json makes it \[256, 64\]",
        ),
        ({"num_experts": 6}, r"mlp\.gate\.weight is \[8, 64\] in the checkpoint"),
        ({"num_attention_heads": 0}, "cannot make this model"),
        ({"num_hidden_layers": 5}, r"cannot make this model|no tensor"),
    ],
)
def test_a_config_of_another_model_is_refused(
    sizes: dict[str, int], sentence: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = rewrite(checkpoints["qwen2_moe"], tmp_path / "other", load_file(checkpoints["qwen2_moe"] / SINGLE))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))

    def read_all() -> None:
        model = StreamedModel(folder)
        for index in range(model.num_layers):
            model.layer(index)

    with pytest.raises(UserError, match=sentence):
        read_all()


def test_not_a_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(SpecError, match=r"config\.json: cannot be read"):
        Checkpoint(tmp_path)
    config = json.loads((checkpoints["olmoe"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(SpecError, match="quantised already"):
        Checkpoint(tmp_path)
