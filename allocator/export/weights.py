"""A checkpoint with quantised experts in compressed-tensors' form, read back by that package before it takes its place.

Codes, scales and zero points are our quantiser's; the package packs them. One layer is in memory at a time, and makes
one file; everything beside the experts is copied as the checkpoint has it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from allocator.allocation import Allocation
from allocator.calibration.data import Sequences
from allocator.calibration.layer_losses import quantized_stacks, turns
from allocator.calibration.model import StreamedModel
from allocator.calibration.quantizer import Quantizer
from allocator.calibration.statistics import gather
from allocator.calibration.visits import Visit, visit
from allocator.export import compressed_tensors
from allocator.export.names import Names
from allocator.report_data import gemm_of
from kernel_gen.formats import QuantizedWeights, dequantize
from profiles.errors import DataError, SpecError
from profiles.models import Linear, LinearId
from profiles.schemes import NumericType, QuantScheme

INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".npy", ".txt")

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: bytes of the experts' tensors, and of all; modules that the package gave back bit by bit."""

    expert_bytes: int
    total_bytes: int
    num_modules: int


def write_checkpoint(
    model: StreamedModel,
    calibration: Sequences,
    allocation: Allocation,
    names: Names,
    quantizer: Quantizer,
    out: Path,
    *,
    batch_size: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Written:
    """The checkpoint of an allocation with one scheme for each layer's experts.

    Args:
        model: the checkpoint that is quantised.
        calibration: what GPTQ and clipping learn from.
        allocation: of this model; schemes of one layer's experts are the same.
        names: the checkpoint's names of linears.
        quantizer: how weights become codes; without rotation, which this form cannot say.
        out: a folder that is not there yet.
        batch_size: sequences at once.
        progress: is given a line after each layer.

    Raises:
        SpecError: `out` exists, the quantiser rotates, or a group size does not divide a linear's inputs.
        DataError: the package refuses the configuration, gives back other weights than were written, or a file cannot
            be written.
    """
    if out.exists():
        raise SpecError(f"{out}: there is something already; name a new folder")
    if quantizer.rotate:
        raise SpecError("compressed-tensors has no form for rotated inputs; quantise without rotation")
    _check_groups(model, allocation)
    content = compressed_tensors.config(allocation, names)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        written = _Writer(partial, model, names, content)
        for seen in visit(model, calibration.tokens, batch_size=batch_size):
            with torch.no_grad():
                written.layer(seen, allocation, quantizer)
            if progress is not None:
                progress(f"layer {seen.layer.index}: written and read back")
        written.rest()
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Written(
        expert_bytes=written.expert_bytes, total_bytes=sum(written.sizes.values()), num_modules=written.num_modules
    )


def _check_groups(model: StreamedModel, allocation: Allocation) -> None:
    for block, scheme in allocation.assignment.items():
        k = gemm_of(block, model.shape)[1]
        if scheme.group_size > 0 and k % scheme.group_size:
            raise SpecError(
                f"{scheme.name} of layer {block.layer} {block.linear.value}: compressed-tensors needs inputs in whole"
                f" groups of {scheme.group_size}, there are {k}; leave the scheme out, or take one scale a channel"
            )


class _Writer:
    """A folder that grows layer by layer."""

    def __init__(self, folder: Path, model: StreamedModel, names: Names, content: Mapping[str, Any]) -> None:
        self.folder, self.model, self.names, self.content = folder, model, names, content
        self.config = QuantizationConfig.model_validate(content)
        self.file_of: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.replaced: set[str] = set()
        self.expert_bytes = self.num_modules = 0

    def layer(self, seen: Visit, allocation: Allocation, quantizer: Quantizer) -> None:
        """A layer's experts, quantised, written and compared."""
        tensors: Tensors = {}
        expected: dict[str, tuple[QuantScheme, Tensor]] = {}
        for module, quantized in self._quantized(seen, allocation, quantizer):
            self.replaced.add(f"{module}.weight")
            tensors |= {f"{module}.{name}": tensor for name, tensor in stored(quantized).items()}
            expected[module] = quantized.scheme, dequantize(quantized)[0].cpu()
        if not tensors:
            return
        file = f"experts-{seen.layer.index:05d}.safetensors"
        self.expert_bytes += self._save(file, tensors)
        with safe_open(self.folder / file, framework="pt") as shard:
            for module, (scheme, values) in expected.items():
                self._compare(shard, module, scheme, values)
        self.num_modules += len(expected)

    def _quantized(
        self, seen: Visit, allocation: Allocation, quantizer: Quantizer
    ) -> Iterator[tuple[str, QuantizedWeights]]:
        """(module, its weights as a stack of one), gate and up apart."""
        for group in seen.groups():
            for experts in turns(group, 1):
                statistics = gather(group, experts)
                for linear in Linear:
                    blocks = [
                        LinearId(layer=seen.layer.index, expert=e + group.first_id, linear=linear) for e in experts
                    ]
                    schemes = {allocation.assignment[block] for block in blocks if block in allocation.assignment}
                    if len(schemes) > 1:
                        raise DataError(f"layer {seen.layer.index}'s experts have several schemes; project first")
                    for scheme, found in quantized_stacks(
                        group, experts, statistics, linear, sorted(schemes, key=lambda s: s.name), quantizer
                    ):
                        if scheme.weights is None:
                            continue  # bf16 stays as the checkpoint has it
                        for slot, block in enumerate(blocks):
                            modules = self.names.modules(block)
                            parts = zip(modules, split(found.weights.expert(slot), len(modules)), strict=True)
                            yield from parts

    def _compare(self, shard: Any, module: str, scheme: QuantScheme, values: Tensor) -> None:
        prefix = f"{module}."
        held = [name for name in shard.offset_keys() if name.startswith(prefix)]
        state = {name.removeprefix(prefix): shard.get_tensor(name) for name in held}
        found = read_back(self.config, self.content, module, state)
        if found.dtype != torch.float32:
            values = values.to(found.dtype)
        if not torch.equal(found, values):
            worst = float((found.float() - values.float()).abs().max())
            raise DataError(f"compressed-tensors reads other weights of {module} ({scheme.name}), by up to {worst:g}")

    def rest(self) -> None:
        """Every other tensor, configuration and tokenizer; then the index."""
        source = self.model.checkpoint.folder
        held = sorted(self.model.checkpoint.names())
        missing = self.replaced - set(held)
        if missing:
            raise DataError(f"{source}: it has no {sorted(missing)[0]}; its experts are not single linears")
        for number, file in enumerate(sorted(source.glob("*.safetensors"))):
            with safe_open(file, framework="pt") as shard:
                kept = {name: shard.get_tensor(name) for name in shard.offset_keys() if name not in self.replaced}
            if kept:
                self._save(f"model-{number:05d}.safetensors", kept)
        index = {"metadata": {"total_size": sum(self.sizes.values())}, "weight_map": self.file_of}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for file in source.iterdir():
            if file.is_file() and file.suffix not in _NOT_COPIED and file.name not in (INDEX, "config.json"):
                shutil.copy2(file, self.folder / file.name)
        config = self.model.checkpoint.config | {"quantization_config": dict(self.content)}
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def _save(self, file: str, tensors: Tensors) -> int:
        save_file(tensors, self.folder / file, metadata={"format": "pt"})
        self.file_of |= dict.fromkeys(tensors, file)
        self.sizes[file] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return self.sizes[file]


def split(weights: QuantizedWeights, parts: int) -> list[QuantizedWeights]:
    """A stack of one cut along its rows: gate and up are one linear here."""
    pieces = [
        (None,) * parts if tensor is None else tensor.chunk(parts, dim=1)
        for tensor in (weights.codes, weights.scales, weights.zeros)
    ]
    return [
        QuantizedWeights(scheme=weights.scheme, codes=codes, scales=scales, zeros=zeros)
        for codes, scales, zeros in zip(*pieces, strict=True)
    ]


def stored(weights: QuantizedWeights) -> Tensors:
    """A module's tensors as the package names them, of a stack of one.

    Codes are moved from [0, 2^b) to two's complement; zero points alike.
    """
    spec = weights.scheme.weights
    assert spec is not None
    assert weights.scales is not None
    codes, scales = weights.codes[0].cpu(), weights.scales[0].cpu().contiguous()
    if spec.type is NumericType.FLOAT:
        return {"weight": codes.contiguous(), "weight_scale": scales}
    middle = 1 << (spec.num_bits - 1)
    signed = (codes.to(torch.int16) - middle).to(torch.int8)
    if compressed_tensors.is_packed(weights.scheme):
        tensors = {
            "weight_packed": pack_to_int32(signed, spec.num_bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(signed.shape, dtype=torch.int64),
        }
        if weights.zeros is not None:
            zeros = (weights.zeros[0].cpu().to(torch.int16) - middle).to(torch.int8)
            tensors["weight_zero_point"] = pack_to_int32(zeros, spec.num_bits, packed_dim=0)
        return tensors
    return {"weight": signed.contiguous(), "weight_scale": scales}


def read_back(config: QuantizationConfig, content: Mapping[str, Any], module: str, state: Tensors) -> Tensor:
    """A module's weights [N, K] as the package decompresses them, by the group of the configuration that names it."""
    from compressed_tensors.utils import is_match

    probe = torch.nn.Linear(1, 1)
    groups = [name for name, group in config.config_groups.items() if is_match(module, probe, group.targets)]
    if len(groups) != 1 or is_match(module, probe, config.ignore):
        raise DataError(f"the configuration names {module} in {len(groups)} groups")
    scheme: QuantizationScheme = config.config_groups[groups[0]]
    compressor = BaseCompressor.get_value_from_registry(content["config_groups"][groups[0]]["format"])
    values: Tensor = compressor.decompress(state, scheme)["weight"]
    return values
