"""Shapes of mixture-of-experts (MoE) models: by name, or from a Hugging Face `config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from profiles.errors import SpecError
from profiles.hf_config import read_moe_fields
from profiles.kernels import GemmShape


class Linear(Enum):
    """A linear layer of an expert. Gate and up share one launch."""

    GATE_UP = "gate_up"
    DOWN = "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearId:
    """One linear layer of one expert of one layer of a model."""

    layer: int
    expert: int
    linear: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGemm:
    """One grouped GEMM of an MoE layer.

    Attributes:
        name: `gate_up`, `down`, `shared_gate_up` or `shared_down`.
        shape: `m` is the rows of all experts together, `n` and `k` are one expert's.
        num_experts: experts that share the launch; 1 for the shared expert.
    """

    name: str
    shape: GemmShape
    num_experts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """The shape of a model's MoE layers, whole or one rank's slice.

    Attributes:
        name: as `--model` takes it.
        hidden_size: features of a token.
        intermediate_size: features between an expert's gate_up and its down.
        num_experts: routed experts of a layer.
        top_k: routed experts that a token goes to.
        num_shared_experts: experts that every token goes to.
        shared_intermediate_size: intermediate features of all shared experts together; they run as one. 0 if there are
            none.
        num_moe_layers: layers that have routed experts.
        source: where the numbers are from.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_shared_experts: int
    shared_intermediate_size: int
    num_moe_layers: int
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("hidden_size", "intermediate_size", "num_experts", "top_k", "num_moe_layers"):
            if getattr(self, field) < 1:
                raise SpecError(f"model {self.name!r}: {field} is {getattr(self, field)}; it must be at least 1")
        if self.top_k > self.num_experts:
            raise SpecError(f"model {self.name!r}: top_k {self.top_k} exceeds its {self.num_experts} experts")
        if self.num_shared_experts < 0 or (self.num_shared_experts > 0) != (self.shared_intermediate_size > 0):
            raise SpecError(
                f"model {self.name!r}: {self.num_shared_experts} shared experts with {self.shared_intermediate_size}"
                " intermediate features; give both or neither"
            )

    def __str__(self) -> str:
        return self.name

    def gemm(self, linear: Linear) -> tuple[int, int]:
        """(n, k) of a routed expert: (2 * intermediate, hidden) of gate_up, (hidden, intermediate) of down."""
        return self._gemm(linear, self.intermediate_size)

    def shared_gemm(self, linear: Linear) -> tuple[int, int]:
        """(n, k) of the shared experts, which run as one.

        Raises:
            SpecError: the model has none.
        """
        if self.num_shared_experts == 0:
            raise SpecError(f"model {self.name!r} has no shared experts")
        return self._gemm(linear, self.shared_intermediate_size)

    def _gemm(self, linear: Linear, intermediate_size: int) -> tuple[int, int]:
        if linear is Linear.GATE_UP:
            return 2 * intermediate_size, self.hidden_size
        return self.hidden_size, intermediate_size

    def layer_gemms(self, num_tokens: int) -> tuple[LayerGemm, ...]:
        """Every grouped GEMM of one MoE layer for a batch of `num_tokens` tokens, the shared experts' last."""
        gemms = []
        for linear in Linear:
            n, k = self.gemm(linear)
            shape = GemmShape(m=num_tokens * self.top_k, n=n, k=k)
            gemms.append(LayerGemm(name=linear.value, shape=shape, num_experts=self.num_experts))
        if self.num_shared_experts:
            for linear in Linear:
                n, k = self.shared_gemm(linear)
                shape = GemmShape(m=num_tokens, n=n, k=k)
                gemms.append(LayerGemm(name=f"shared_{linear.value}", shape=shape, num_experts=1))
        return tuple(gemms)

    def expert_parallel(self, ranks: int) -> MoeShape:
        """One rank's slice when the routed experts are spread over `ranks`; shared experts are on every rank.

        A token reaches at most all of a rank's experts, so `top_k` falls to their number where it is greater. What a
        rank's experts get is a slice of the whole model's load: `TokenLoad.expert_parallel`.

        Raises:
            SpecError: `ranks` does not divide the experts.
        """
        self._check_divides(ranks, "expert-parallel", {"num_experts": self.num_experts})
        num_experts = self.num_experts // ranks
        name = self._slice_name("ep", ranks)
        return replace(self, name=name, num_experts=num_experts, top_k=min(self.top_k, num_experts))

    def tensor_parallel(self, ranks: int) -> MoeShape:
        """One rank's slice when every expert's intermediate features are spread over `ranks`: gate_up loses rows, down
        columns.

        Raises:
            SpecError: `ranks` does not divide the intermediate sizes.
        """
        sizes = {"intermediate_size": self.intermediate_size, "shared_intermediate_size": self.shared_intermediate_size}
        self._check_divides(ranks, "tensor-parallel", sizes)
        return replace(
            self,
            name=self._slice_name("tp", ranks),
            intermediate_size=self.intermediate_size // ranks,
            shared_intermediate_size=self.shared_intermediate_size // ranks,
        )

    def _check_divides(self, ranks: int, kind: str, sizes: Mapping[str, int]) -> None:
        for field, size in sizes.items():
            if ranks < 1 or size % ranks:
                raise SpecError(f"model {self.name!r}: {ranks} {kind} ranks do not divide {field} {size}")

    def _slice_name(self, suffix: str, ranks: int) -> str:
        return self.name if ranks == 1 else f"{self.name}-{suffix}{ranks}"


def _known(name: str, *, source: str, **fields: int) -> MoeShape:
    defaults = {"num_shared_experts": 0, "shared_intermediate_size": 0}
    return MoeShape(name=name, source=f"config.json of {source}", **(defaults | fields))


MODELS: Mapping[str, MoeShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            _known(
                "qwen1.5-moe-a2.7b",
                hidden_size=2048,
                intermediate_size=1408,
                num_experts=60,
                top_k=4,
                num_shared_experts=1,
                shared_intermediate_size=5632,
                num_moe_layers=24,
                source="Qwen/Qwen1.5-MoE-A2.7B: hidden_size, moe_intermediate_size, num_experts, num_experts_per_tok,"
                " shared_expert_intermediate_size, num_hidden_layers (decoder_sparse_step 1)",
            ),
            _known(
                "qwen2-57b-a14b",
                hidden_size=3584,
                intermediate_size=2560,
                num_experts=64,
                top_k=8,
                num_shared_experts=1,
                shared_intermediate_size=20480,
                num_moe_layers=28,
                source="Qwen/Qwen2-57B-A14B: hidden_size, moe_intermediate_size, num_experts, num_experts_per_tok,"
                " shared_expert_intermediate_size, num_hidden_layers (decoder_sparse_step 1)",
            ),
            _known(
                "deepseek-v2-lite",
                hidden_size=2048,
                intermediate_size=1408,
                num_experts=64,
                top_k=6,
                num_shared_experts=2,
                shared_intermediate_size=2816,
                num_moe_layers=26,
                source="deepseek-ai/DeepSeek-V2-Lite: hidden_size, moe_intermediate_size, n_routed_experts,"
                " num_experts_per_tok, n_shared_experts 2 of moe_intermediate_size,"
                " num_hidden_layers 27 less first_k_dense_replace 1",
            ),
            _known(
                "mixtral-8x7b",
                hidden_size=4096,
                intermediate_size=14336,
                num_experts=8,
                top_k=2,
                num_moe_layers=32,
                source="mistralai/Mixtral-8x7B-v0.1: hidden_size, intermediate_size, num_local_experts,"
                " num_experts_per_tok, num_hidden_layers",
            ),
            _known(
                "qwen3-30b-a3b",
                hidden_size=2048,
                intermediate_size=768,
                num_experts=128,
                top_k=8,
                num_moe_layers=48,
                source="Qwen/Qwen3-30B-A3B: hidden_size, moe_intermediate_size, num_experts,"
                " num_experts_per_tok, num_hidden_layers (decoder_sparse_step 1, no mlp_only_layers)",
            ),
            _known(
                "deepseek-v3",
                hidden_size=7168,
                intermediate_size=2048,
                num_experts=256,
                top_k=8,
                num_shared_experts=1,
                shared_intermediate_size=2048,
                num_moe_layers=58,
                source="deepseek-ai/DeepSeek-V3: hidden_size, moe_intermediate_size, n_routed_experts,"
                " num_experts_per_tok, n_shared_experts 1 of moe_intermediate_size,"
                " num_hidden_layers 61 less first_k_dense_replace 3",
            ),
            _known(
                "olmoe-1b-7b",
                hidden_size=2048,
                intermediate_size=1024,
                num_experts=64,
                top_k=8,
                num_moe_layers=16,
                source="allenai/OLMoE-1B-7B-0924: hidden_size, intermediate_size, num_experts,"
                " num_experts_per_tok, num_hidden_layers",
            ),
            _known(
                "gpt-oss-20b",
                hidden_size=2880,
                intermediate_size=2880,
                num_experts=32,
                top_k=4,
                num_moe_layers=24,
                source="openai/gpt-oss-20b: hidden_size, intermediate_size, num_local_experts,"
                " num_experts_per_tok, num_hidden_layers",
            ),
        )
    }
)
"""Every known model by name."""

_SLICED = re.compile(r"(.+)-(ep|tp)([1-9]\d{0,3})", re.ASCII)


def model(name: str) -> MoeShape:
    """The model of a name; `-ep{ranks}` or `-tp{ranks}` behind it, or both, is one rank's slice:
    `mixtral-8x7b-ep4-tp2`.

    Raises:
        SpecError: no model of this name is known, or it cannot be sliced so.
    """
    if name in MODELS:
        return MODELS[name]
    sliced = _SLICED.fullmatch(name)
    if sliced is None:
        known = ", ".join(MODELS)
        raise SpecError(f"unknown model {name!r}: known are {known}, or give the path of a Hugging Face config.json")
    whole, ranks = model(sliced[1]), int(sliced[3])
    return whole.expert_parallel(ranks) if sliced[2] == "ep" else whole.tensor_parallel(ranks)


def model_from_config(path: str | Path) -> MoeShape:
    """The shape of the model that a Hugging Face `config.json`, or a folder that holds one, describes; named after the
    folder.

    Raises:
        SpecError: the file is not a JSON object, or describes no MoE that is understood; the sentence names the missing
            keys.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    fields = read_moe_fields(file)
    name = file.resolve().parent.name.lower() if file.name == "config.json" else file.stem.lower()
    return MoeShape(name=name, source=f"{file}", **fields)


def find_model(name_or_path: str) -> MoeShape:
    """What `--model` takes: a known name (with a slice behind it, if any), else the path of a `config.json` or of its
    folder.

    Raises:
        SpecError: it is neither.
    """
    path = Path(name_or_path)
    is_path = path.suffix == ".json" or len(path.parts) > 1 or path.is_dir()
    return model_from_config(path) if is_path and name_or_path not in MODELS else model(name_or_path)
