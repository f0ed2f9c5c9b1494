import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import SpecError
from profiles.kernels import GemmShape
from profiles.models import MODELS, Linear, MoeShape, find_model, model, model_from_config

shapes = st.sampled_from(list(MODELS.values()))


def size(shape: MoeShape) -> dict[str, int]:
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_experts",
        "top_k",
        "num_shared_experts",
        "shared_intermediate_size",
    )
    return {field: getattr(shape, field) for field in (*fields, "num_moe_layers")}


# The MoE part of each model's config.json, in its family's keys.
QWEN = {"num_experts_per_tok": 4, "decoder_sparse_step": 1, "intermediate_size": 5632, "hidden_size": 2048}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen1.5-moe-a2.7b": QWEN
    | {
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
    },
    "qwen2-57b-a14b": QWEN
    | {
        "num_experts": 64,
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480,
        "num_hidden_layers": 28,
    }
    | {"num_experts_per_tok": 8, "hidden_size": 3584, "intermediate_size": 18944},
    "deepseek-v2-lite": {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
    },
    "mixtral-8x7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek-v3": {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
    },
    "olmoe-1b-7b": {
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
    },
    "gpt-oss-20b": {
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "num_hidden_layers": 24,
    },
}


def write(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_known_model_is_what_its_config_says(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / name.upper(), CONFIGS[name])
    from_folder, from_file = model_from_config(folder), model_from_config(folder / "config.json")
    assert size(from_folder) == size(from_file) == size(model(name))
    assert from_folder.name == name
    assert MODELS[name].source


@given(shapes)
def test_gemms_of_a_layer(shape: MoeShape) -> None:
    gemms = {gemm.name: gemm for gemm in shape.layer_gemms(100)}
    assert gemms["gate_up"].shape == GemmShape(m=100 * shape.top_k, n=2 * shape.intermediate_size, k=shape.hidden_size)
    assert gemms["down"].shape == GemmShape(m=100 * shape.top_k, n=shape.hidden_size, k=shape.intermediate_size)
    assert gemms["down"].num_experts == shape.num_experts
    if shape.num_shared_experts:
        assert gemms["shared_gate_up"].shape.n == 2 * shape.shared_intermediate_size
        assert gemms["shared_down"].shape == GemmShape(m=100, n=shape.hidden_size, k=shape.shared_intermediate_size)
        assert gemms["shared_down"].num_experts == 1
    else:
        assert set(gemms) == {"gate_up", "down"}
        with pytest.raises(SpecError, match="no shared experts"):
            shape.shared_gemm(Linear.DOWN)


@given(shapes, st.integers(-1, 70))
def test_slices_of_all_ranks_make_the_whole(shape: MoeShape, ranks: int) -> None:
    if ranks > 0 and shape.num_experts % ranks == 0:
        part = shape.expert_parallel(ranks)
        assert part.num_experts * ranks == shape.num_experts
        assert part.top_k == min(shape.top_k, part.num_experts)
        assert part.gemm(Linear.DOWN) == shape.gemm(Linear.DOWN)
        assert model(part.name) == part
    else:
        with pytest.raises(
            SpecError, match=f"{ranks} expert-parallel ranks do not divide num_experts {shape.num_experts}"
        ):
            shape.expert_parallel(ranks)
    if ranks > 0 and shape.intermediate_size % ranks == 0 and shape.shared_intermediate_size % ranks == 0:
        part = shape.tensor_parallel(ranks)
        assert part.gemm(Linear.GATE_UP)[0] * ranks == shape.gemm(Linear.GATE_UP)[0]
        assert part.gemm(Linear.DOWN)[1] * ranks == shape.gemm(Linear.DOWN)[1]
        assert part.shared_intermediate_size * ranks == shape.shared_intermediate_size
        assert model(part.name) == part
    else:
        with pytest.raises(SpecError, match="tensor-parallel ranks do not divide"):
            shape.tensor_parallel(ranks)


def test_a_slice_of_a_slice_has_a_name() -> None:
    assert model("mixtral-8x7b-ep4-tp2") == model("mixtral-8x7b").expert_parallel(4).tensor_parallel(2)


def test_layers_that_are_dense_are_not_counted(tmp_path: Path) -> None:
    def layers(**changes: Any) -> int:
        return model_from_config(write(tmp_path / "model", CONFIGS["qwen3-30b-a3b"] | changes)).num_moe_layers

    assert layers(decoder_sparse_step=2) == 24
    assert layers(mlp_only_layers=[0, 47]) == 46
    assert layers(mlp_only_layers=[0, 47], decoder_sparse_step=2) == 23  # of the two, only 47 is an expert layer
    assert layers(first_k_dense_replace=3) == 45
    assert layers(num_dense_layers=2) == 46
    assert layers(mlp_layer_types=["dense"] * 3 + ["sparse"] * 45, first_k_dense_replace=1) == 45
    assert layers(mlp_layer_types=["hash_moe"] * 3 + ["moe"] * 45) == 48
    assert layers(moe_layer_freq=5) == 10
    assert layers(moe_layer_freq=[0] * 40 + [1] * 8) == 8
    assert layers(moe_layers=[1, 3]) == 2
    assert layers(interleave_moe_layer_step=4) == 12
    assert layers(expert_layer_period=2, expert_layer_offset=1) == 24


def test_a_multimodal_model_is_its_language_part(tmp_path: Path) -> None:
    llama = {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "interleave_moe_layer_step": 1,
    }
    shape = model_from_config(write(tmp_path / "Scout", {"text_config": llama, "vision_config": {"hidden_size": 1408}}))
    assert shape.gemm(Linear.GATE_UP) == (16384, 5120)
    assert shape.shared_intermediate_size == 8192


def test_experts_may_be_described_one_level_deeper(tmp_path: Path) -> None:
    """As DBRX's are, whose ffn_config has a hidden_size of its own when transformers writes every default."""
    experts = {"ffn_hidden_size": 10752, "hidden_size": 2048, "moe_num_experts": 16, "moe_top_k": 4}
    config = {"model_type": "dbrx", "d_model": 6144, "n_layers": 40, "ffn_config": experts}
    shape = model_from_config(write(tmp_path / "dbrx", config))
    assert (shape.gemm(Linear.GATE_UP), shape.gemm(Linear.DOWN)) == ((21504, 6144), (6144, 10752))
    assert (shape.num_experts, shape.top_k, shape.num_moe_layers) == (16, 4, 40)


def test_numbers_per_layer_that_agree_are_one_number(tmp_path: Path) -> None:
    config = CONFIGS["mixtral-8x7b"] | {"num_experts_per_tok": [2] * 32}
    assert model_from_config(write(tmp_path / "m", config)).top_k == 2
    with pytest.raises(SpecError, match="num_experts_per_tok is "):
        model_from_config(write(tmp_path / "m", config | {"num_experts_per_tok": [2, 4]}))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
            r"missing: num_experts or .*; num_experts_per_tok or",
        ),
        ({}, "missing: .*hidden_size.*moe_intermediate_size or intermediate_size; num_hidden_layers"),
        (CONFIGS["mixtral-8x7b"] | {"num_local_experts": 1}, "a dense model, it has 1 experts"),
        (CONFIGS["mixtral-8x7b"] | {"hidden_size": "4096"}, 'hidden_size is "4096"; a whole number'),
        (CONFIGS["mixtral-8x7b"] | {"hidden_size": True}, "hidden_size is true"),
        (CONFIGS["mixtral-8x7b"] | {"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        (CONFIGS["mixtral-8x7b"] | {"hidden_size": -1}, "hidden_size is -1"),
        (CONFIGS["mixtral-8x7b"] | {"num_experts_per_tok": 9}, "top_k 9 exceeds its 8 experts"),
        (CONFIGS["deepseek-v3"] | {"first_k_dense_replace": 61}, "none of its 61 layers has routed experts"),
        (CONFIGS["qwen3-30b-a3b"] | {"mlp_only_layers": ["0"]}, "mlp_only_layers is .* a list of whole numbers"),
        ([1, 2], "a JSON object is needed"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(config: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=says):
        model_from_config(write(tmp_path / "model", config))


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"config\.json: cannot be read"):
        model_from_config(tmp_path)
    for content in (b"{", b"\xff\xfe", b""):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(SpecError, match="not JSON"):
            model_from_config(tmp_path)


def test_find_model_takes_a_name_or_a_path(tmp_path: Path) -> None:
    folder = write(tmp_path / "My-Model", CONFIGS["gpt-oss-20b"])
    assert find_model("gpt-oss-20b") is MODELS["gpt-oss-20b"]
    assert find_model("mixtral-8x7b-ep2").num_experts == 4
    assert find_model(str(folder)).name == find_model(str(folder / "config.json")).name == "my-model"
    with pytest.raises(SpecError, match=r"unknown model 'gpt-5': known are qwen1\.5-moe-a2.7b, "):
        find_model("gpt-5")
    with pytest.raises(SpecError, match="cannot be read"):
        find_model(str(tmp_path / "nowhere"))
