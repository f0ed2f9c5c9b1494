"""What differs from one MoE architecture to the next: where its experts are, in the checkpoint and in the module tree.

Everything else is common: the decoder layer is transformers' own class, its routed and shared experts are replaced by
allocator.calibration.experts, which computes the same and can be quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from allocator.calibration.checkpoint import Checkpoint
from profiles.errors import DataError, UserError


class UnknownArchitectureError(UserError):
    """No adapter takes this model_type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Experts side by side: gate_up [E, 2*I, H] (gate's rows first) and down [E, H, I]."""

    gate_up: Tensor
    down: Tensor


class MoeAdapter(Protocol):
    """One family of architectures."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """config.json's model_type of those that it takes."""

    def block(self, layer: nn.Module) -> nn.Module | None:
        """The MoE block of a decoder layer; None of a dense layer."""

    def routed(
        self, checkpoint: Checkpoint, layer: int, num_experts: int, dtype: torch.dtype, device: torch.device
    ) -> ExpertWeights:
        """One layer's routed experts, read from the checkpoint."""

    def shared(self, block: nn.Module) -> nn.Module | None:
        """The shared experts' module: takes x, returns their output before any gate. None if there are none."""

    def shared_weights(self, shared: nn.Module) -> ExpertWeights:
        """The shared experts as a stack of one."""

    def shared_gate(self, block: nn.Module, x: Tensor) -> Tensor | None:
        """What multiplies the shared experts' output, [tokens, 1]; None for 1."""

    def install(self, block: nn.Module, routed: nn.Module, shared: nn.Module | None) -> None:
        """Put other modules in the place of the experts. `routed` is called with (x [tokens, H], index [tokens, k],
        weights [tokens, k]) and returns [tokens, H]; `shared` with x.
        """

    def module_name(self, name: str) -> str | None:
        """A tensor's name in the decoder layer from its name in the checkpoint, both relative to the layer; None for a
        routed expert's.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedExperts:
    """Architectures whose transformers class has a block at `layer.mlp` with `experts(x, index, weights)`.

    In the checkpoint the routed experts may be one tensor for each expert and projection (the hub's form), one for gate
    and up together, or one 3-D tensor for all experts of a layer.

    Attributes:
        model_types: config.json's.
        checkpoint_block: the block's name in the checkpoint.
        gate, up, down: the projections' names there.
        router: the module of the tensors that the checkpoint calls `gate`.
        shared_name: the attribute of the shared experts' module; "" if there are none.
        shared_gate_name: that of the linear whose sigmoid gates them; "" for none.
    """

    model_types: tuple[str, ...]
    checkpoint_block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    shared_name: str = ""
    shared_gate_name: str = ""

    def block(self, layer: nn.Module) -> nn.Module | None:
        """`layer.mlp` if it has experts."""
        block = layer.get_submodule("mlp")
        return block if hasattr(block, "experts") else None

    def routed(
        self, checkpoint: Checkpoint, layer: int, num_experts: int, dtype: torch.dtype, device: torch.device
    ) -> ExpertWeights:
        """From whichever form the checkpoint has. DataError names what was looked for."""
        stem = f"model.layers.{layer}.{self.checkpoint_block}.experts"
        for suffix in ("", ".weight"):
            fused = [f"{stem}.gate_up_proj{suffix}", f"{stem}.down_proj{suffix}"]
            if all(name in checkpoint for name in fused):
                tensors = checkpoint.load(fused, dtype=dtype, device=device)
                return _checked(ExpertWeights(gate_up=tensors[fused[0]], down=tensors[fused[1]]), num_experts, stem)
        experts = range(num_experts)
        down = _stacked(checkpoint, [f"{stem}.{e}.{self.down}.weight" for e in experts], dtype, device)
        if f"{stem}.0.gate_up_proj.weight" in checkpoint:
            gate_up = _stacked(checkpoint, [f"{stem}.{e}.gate_up_proj.weight" for e in experts], dtype, device)
        else:
            gate = _stacked(checkpoint, [f"{stem}.{e}.{self.gate}.weight" for e in experts], dtype, device)
            up = _stacked(checkpoint, [f"{stem}.{e}.{self.up}.weight" for e in experts], dtype, device)
            gate_up = torch.cat((gate, up), dim=1)
        return _checked(ExpertWeights(gate_up=gate_up, down=down), num_experts, stem)

    def shared(self, block: nn.Module) -> nn.Module | None:
        """The attribute, if this block has it."""
        module = getattr(block, self.shared_name, None) if self.shared_name else None
        return module if isinstance(module, nn.Module) else None

    def shared_weights(self, shared: nn.Module) -> ExpertWeights:
        """gate_proj, up_proj and down_proj, without bias. DataError for a bias."""
        gate, up, down = (shared.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
        if any(getattr(linear, "bias", None) is not None for linear in (gate, up, down)):
            raise DataError("the shared experts have a bias; this adapter takes experts without")
        gate_up = torch.cat((gate.get_parameter("weight"), up.get_parameter("weight"))).detach()
        return ExpertWeights(gate_up=gate_up.unsqueeze(0), down=down.get_parameter("weight").detach().unsqueeze(0))

    def shared_gate(self, block: nn.Module, x: Tensor) -> Tensor | None:
        """The sigmoid of the gate's linear."""
        if not self.shared_gate_name:
            return None
        gate: Tensor = block.get_submodule(self.shared_gate_name)(x)
        return torch.sigmoid(gate)

    def install(self, block: nn.Module, routed: nn.Module, shared: nn.Module | None) -> None:
        """Replace the two attributes."""
        block.experts = routed
        if shared is not None:
            setattr(block, self.shared_name, shared)

    def module_name(self, name: str) -> str | None:
        """The block is `mlp` in the module tree."""
        head, dot, rest = name.partition(".")
        if head != self.checkpoint_block:
            return name
        if rest.startswith("experts."):
            return None
        return f"mlp.{self.router}.{rest.removeprefix('gate.')}" if rest.startswith("gate.") else f"mlp{dot}{rest}"


def _stacked(checkpoint: Checkpoint, names: list[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensors = checkpoint.load(names, dtype=dtype, device=device)
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) > 1:
        raise DataError(f"{checkpoint.folder}: {names[0]} and its like differ in shape: {sorted(shapes)}")
    return torch.stack([tensors[name] for name in names])


def _checked(weights: ExpertWeights, num_experts: int, stem: str) -> ExpertWeights:
    up, down = tuple(weights.gate_up.shape), tuple(weights.down.shape)
    if (
        len(up) != 3
        or len(down) != 3
        or up[0] != num_experts
        or down[0] != num_experts
        or up[1:] != (2 * down[2], down[1])
    ):
        raise DataError(
            f"{stem}: gate_up {[*up]} and down {[*down]} are not [{num_experts}, 2 * I, H] and [{num_experts}, H, I]"
        )
    return weights


_ADAPTERS: list[MoeAdapter] = [
    FusedExperts(model_types=("qwen2_moe",), shared_name="shared_expert", shared_gate_name="shared_expert_gate"),
    FusedExperts(model_types=("qwen3_moe", "olmoe")),
    FusedExperts(model_types=("mixtral",), checkpoint_block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    FusedExperts(
        model_types=("phimoe",), checkpoint_block="block_sparse_moe", gate="w1", up="w3", down="w2", router="router"
    ),
    FusedExperts(model_types=("deepseek_v2", "deepseek_v3", "glm4_moe"), shared_name="shared_experts"),
]


def adapters() -> Mapping[str, MoeAdapter]:
    """Every adapter by model_type, the last registered first."""
    return MappingProxyType({kind: adapter for adapter in _ADAPTERS for kind in adapter.model_types})


def register(adapter: MoeAdapter) -> None:
    """Take another architecture."""
    _ADAPTERS.append(adapter)


def adapter_of(model_type: str) -> MoeAdapter:
    """The adapter of a model_type. UnknownArchitectureError says what one needs."""
    known = adapters()
    if model_type not in known:
        raise UnknownArchitectureError(
            f"no adapter takes model_type {model_type!r} (known: {', '.join(known)}); one needs the MoE block of a"
            " decoder layer, the names of its experts' tensors in the checkpoint, and how to put other experts in their"
            " place: see allocator.calibration.adapters, MoeAdapter and register()"
        )
    return known[model_type]
