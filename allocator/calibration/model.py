"""A checkpoint that runs layer by layer: one decoder layer in memory at a time, or as many as are kept.

transformers' own model, made without weights, says what each decoder layer is called with (masks, position embeddings);
the layers are its own classes, their experts replaced by allocator.calibration.experts.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from allocator.calibration.adapters import MoeAdapter, adapter_of
from allocator.calibration.checkpoint import Checkpoint
from allocator.calibration.experts import Experts, SharedExperts
from profiles.errors import DataError, SpecError
from profiles.models import MoeShape, model_from_config

_TOP = "model."
_CONFIG_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, StrictDataclassError,
    TypeError, ValueError,
)  # fmt: skip
"""What transformers raises for sizes that make no model."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedLayer:
    """One decoder layer with its weights. block, routed: None in a dense layer; shared: None without shared experts."""

    index: int
    module: nn.Module
    block: nn.Module | None
    routed: Experts | None
    shared: Experts | None


class StreamedModel:
    """An MoE language model on disk, run layer by layer.

    Attributes:
        shape: its sizes; named after the folder.
        adapter: what its architecture needs.
        device, dtype: where and in what it runs.
        vocab_size: token ids are below it.
        max_length: most tokens of a sequence; None if the model does not say.
        num_layers: decoder layers, dense ones too.
        moe_layers: indices of those with routed experts.
    """

    def __init__(
        self, folder: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None, layers_kept: int = 1
    ) -> None:
        """Reads names and the tensors outside the layers.

        Args:
            folder: the checkpoint.
            device: by default a GPU where torch sees one.
            dtype: by default float32 on a CPU and bfloat16 elsewhere.
            layers_kept: decoder layers held in memory, least recently used first out.

        Raises:
            SpecError, DataError: not a checkpoint that can be read. UnknownArchitectureError: no adapter.
        """
        self.checkpoint = Checkpoint(folder)
        self.adapter: MoeAdapter = adapter_of(self.checkpoint.model_type)
        self.shape: MoeShape = model_from_config(self.checkpoint.folder)
        self.device = _device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self._model = _without_weights(self.checkpoint.folder)
        self._base: nn.Module = self._model.get_submodule(_TOP.rstrip("."))
        self._layers = list(cast(nn.ModuleList, self._base.get_submodule("layers")))
        self._calls: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._kept: OrderedDict[int, LoadedLayer] = OrderedDict()
        self._layers_kept = max(1, layers_kept)
        config: Any = self._model.config
        self.vocab_size = int(config.vocab_size)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.num_layers = len(self._layers)
        self.moe_layers = tuple(i for i, layer in enumerate(self._layers) if self.adapter.block(layer) is not None)
        self._load_top()

    def embed(self, tokens: Tensor) -> Tensor:
        """The first layer's input [batch, length, H] of token ids [batch, length]."""
        with torch.no_grad():
            return self._seen(tokens)[0]

    def layer(self, index: int) -> LoadedLayer:
        """A decoder layer, read unless it is kept."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        while len(self._kept) >= self._layers_kept:
            self._kept.popitem(last=False)
        self._kept[index] = self._load(index)
        return self._kept[index]

    def run(self, layer: LoadedLayer, hidden: Tensor) -> Tensor:
        """A decoder layer's output [batch, length, H], of sequences without padding."""
        arguments = self._arguments(hidden.shape[0], hidden.shape[1])[layer.index]
        output = layer.module(hidden, **arguments)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [batch, length, vocabulary] from the last layer's output."""
        normed = self._base.get_submodule("norm")(hidden)
        return cast(Tensor, self._model.get_submodule("lm_head")(normed)).float()

    def _arguments(self, batch: int, length: int) -> list[dict[str, Any]]:
        """What every layer is called with, for sequences of one size."""
        if (batch, length) not in self._calls:
            with torch.no_grad():
                self._seen(torch.zeros(batch, length, dtype=torch.long))
        return self._calls[batch, length]

    def _seen(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """transformers' forward over layers that only note what they are called with."""
        watchers = [_Watcher(layer) for layer in self._layers]
        layers = self._base._modules["layers"]
        self._base._modules["layers"] = nn.ModuleList(watchers)
        try:
            self._base(input_ids=tokens.to(self.device), use_cache=False)
        finally:
            self._base._modules["layers"] = layers
        calls = [watcher.arguments for watcher in watchers]
        self._calls[tokens.shape[0], tokens.shape[1]] = calls
        first = watchers[0].hidden
        assert first is not None
        return first, calls

    def _load_top(self) -> None:
        """Everything outside the layers: embeddings, the last norm, the head, rotary tables."""
        names = [name for name in self.checkpoint.names() if not name.startswith(f"{_TOP}layers.")]
        wanted = {
            name: None
            for name, _ in [*self._model.named_parameters(), *self._model.named_buffers()]
            if not name.startswith(f"{_TOP}layers.")
        }
        tensors = self.checkpoint.load([n for n in names if n in wanted], dtype=self.dtype, device=self.device)
        head, embedding = "lm_head.weight", f"{_TOP}embed_tokens.weight"
        if head not in tensors and embedding in tensors and getattr(self._model.config, "tie_word_embeddings", False):
            tensors[head] = tensors[embedding]
        self._put(tensors, self._model)
        for name, module in list(self._base.named_children()):
            if name != "layers" and not list(module.parameters()) and list(module.buffers()):  # rotary tables
                self._base.add_module(name, type(module)(self._model.config).to(self.device))
        for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
            if tensor.is_meta and not name.startswith(f"{_TOP}layers."):
                raise DataError(f"{self.checkpoint.folder}: no tensor {name} in the checkpoint")
        self._model.requires_grad_(False)

    def _load(self, index: int) -> LoadedLayer:
        module = copy.deepcopy(self._layers[index])
        block = self.adapter.block(module)
        routed, shared_module = None, None
        if block is not None:
            activation = block.get_submodule("experts.act_fn") if hasattr(block.experts, "act_fn") else nn.SiLU()
            weights = self.adapter.routed(self.checkpoint, index, self.shape.num_experts, self.dtype, self.device)
            routed = Experts(weights, activation)
            shared_module = self.adapter.shared(block)
            self.adapter.install(block, routed, None)
        self._fill(module, index)
        shared = None
        if block is not None and routed is not None and shared_module is not None:
            shared = Experts(self.adapter.shared_weights(shared_module), routed.activation)
            self.adapter.install(block, routed, SharedExperts(shared))
        return LoadedLayer(
            index=index, module=module.eval().requires_grad_(False), block=block, routed=routed, shared=shared
        )

    def _fill(self, module: nn.Module, index: int) -> None:
        """Everything of a layer but its routed experts."""
        prefix = f"{_TOP}layers.{index}."
        present = dict(module.state_dict(keep_vars=True))
        names = {name: self.adapter.module_name(name.removeprefix(prefix)) for name in self.checkpoint.names(prefix)}
        wanted = {name: inner for name, inner in names.items() if inner in present}
        precise = tuple(getattr(self._model, "_keep_in_fp32_modules_strict", None) or ())
        for dtype, chosen in (
            (torch.float32, [name for name in wanted if any(part in name for part in precise)]),
            (self.dtype, [name for name in wanted if not any(part in name for part in precise)]),
        ):
            tensors = self.checkpoint.load(chosen, dtype=dtype, device=self.device)
            self._put({str(wanted[n]): t for n, t in tensors.items()}, module)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_meta:
                raise DataError(f"{self.checkpoint.folder}: layer {index} has no tensor {name} in the checkpoint")

    def _put(self, tensors: dict[str, Tensor], module: nn.Module) -> None:
        """In the place of a module's own. DataError for another shape than config.json makes it."""
        own = module.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            if name in own and own[name].shape != tensor.shape:
                raise DataError(
                    f"{self.checkpoint.folder}: {name} is {[*tensor.shape]} in the checkpoint, and config.json makes it"
                    f" {[*own[name].shape]}; they belong to different models"
                )
        module.load_state_dict(tensors, strict=False, assign=True)


def _device(name: str | None) -> torch.device:
    """SpecError for a GPU where torch sees none."""
    has_gpu = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    if device.type == "cuda" and not has_gpu:
        raise SpecError(f"device {name}: torch {torch.__version__} sees no GPU here; leave it out to run on the CPU")
    return device


class _Watcher(nn.Module):
    """In a decoder layer's place: notes the call, returns its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *_: object, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states


def _without_weights(folder: Path) -> nn.Module:
    """transformers' model on the meta device."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except _CONFIG_ERRORS as error:
        reason = " ".join(str(error).split())
        raise SpecError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} cannot make this model"
            f" ({reason or type(error).__name__})"
        ) from error
    return cast(nn.Module, model.eval())
