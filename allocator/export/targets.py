"""What can be exported: the schemes that a form of checkpoint can say, and those that an engine loads for experts.

An engine's limits are those of its fused MoE layers, read in the sources of vLLM, SGLang and TensorRT-LLM's PyTorch
backend in November 2026; they are stated here and nowhere else. Whether a GPU runs them is the engine's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from allocator.allocation import Granularity
from profiles.errors import SpecError
from profiles.schemes import NumericType, QuantScheme, Strategy


class Form(Enum):
    """A configuration's form."""

    NATIVE = "native"  # the Allocation file
    COMPRESSED_TENSORS = "compressed-tensors"  # quantization_config of config.json
    GPTQ = "gptq"  # quantize_config.json with `dynamic` rules
    MODELOPT = "modelopt"  # hf_quant_config.json


class Engine(Enum):
    """What is to load it."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TRTLLM = "trtllm"


WRITTEN = {
    Form.NATIVE: "the allocation itself, which bitile's own layers read",
    Form.COMPRESSED_TENSORS: "a configuration, no weights: it belongs into config.json as quantization_config, beside"
    " weights that were quantised so; --weights writes such a checkpoint",
    Form.GPTQ: "a configuration, no weights: quantise with GPTQModel and a QuantizeConfig of these fields; what it"
    " saves is what an engine loads",
    Form.MODELOPT: "a configuration, no weights: quantise the modules with ModelOpt as it names them; what"
    " export_hf_checkpoint then writes is what an engine loads",
}
"""What the file is, and what the user has yet to do."""
DEFAULT_FORM = {
    Engine.VLLM: Form.COMPRESSED_TENSORS,
    Engine.SGLANG: Form.COMPRESSED_TENSORS,
    Engine.TRTLLM: Form.MODELOPT,
}
FORMS_OF = {
    Engine.VLLM: (Form.COMPRESSED_TENSORS, Form.GPTQ),
    Engine.SGLANG: (Form.COMPRESSED_TENSORS, Form.GPTQ),
    Engine.TRTLLM: (Form.MODELOPT,),
}
MODELOPT_ALGORITHMS = {
    "w8a16_g-1_sym": "W8A16",
    "w4a16_g-1_sym": "W4A16",
    "w4a16_g128_sym": "W4A16_AWQ",
    "w4a16_g128_asym": "W4A16_AWQ",
    "w8a8_g-1_sym": "W8A8_SQ_PER_CHANNEL",
    "w8a8_g-1_sym_e4m3": "FP8_PER_CHANNEL_PER_TOKEN",
}
"""ModelOpt's name of a scheme; smoothing scales, where it has any, are ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A form, and the engine that is to load it, if one is named."""

    form: Form
    engine: Engine | None = None

    def __post_init__(self) -> None:
        if self.engine is not None and self.form is not Form.NATIVE and self.form not in FORMS_OF[self.engine]:
            forms = ", ".join(form.value for form in FORMS_OF[self.engine])
            raise SpecError(
                f"{self.engine.value} does not load mixed precisions from {self.form.value}; it does from {forms}"
            )
        if self.engine is not None and self.form is Form.NATIVE:
            raise SpecError(f"{self.engine.value} does not load bitile's own form; leave --target out or name another")

    @property
    def name(self) -> str:
        """`compressed-tensors for vllm`."""
        return self.form.value if self.engine is None else f"{self.form.value} for {self.engine.value}"

    @property
    def granularity(self) -> Granularity:
        """The finest that it can say. compressed-tensors and ModelOpt mean one scheme for a layer's experts, and so
        does every engine's fused MoE layer; GPTQ's rules name single linears.
        """
        if self.form is Form.NATIVE or (self.form is Form.GPTQ and self.engine is None):
            return Granularity.LINEAR
        return Granularity.LAYER

    def reasons(self, scheme: QuantScheme) -> tuple[str, ...]:
        """Why a scheme cannot be exported; empty if it can."""
        said = _form_reasons(self.form, scheme)
        return said or (() if self.engine is None else _engine_reasons(self.engine, self.form, scheme))

    def split(self, schemes: Sequence[QuantScheme]) -> tuple[list[QuantScheme], dict[QuantScheme, tuple[str, ...]]]:
        """(those that can be exported, the others with reasons)."""
        refused = {scheme: why for scheme in schemes if (why := self.reasons(scheme))}
        return [scheme for scheme in schemes if scheme not in refused], refused

    def alternatives(self, schemes: Sequence[QuantScheme]) -> list[tuple[QuantScheme, ...]]:
        """Sets of schemes of which one checkpoint may mix any. SGLang's weight-only MoE method reads one set of bits
        and group for the whole model, so that each weight-only scheme is an alternative to the others.
        """
        if self.engine is not Engine.SGLANG or self.form is not Form.COMPRESSED_TENSORS:
            return [tuple(schemes)]
        weight_only = [scheme for scheme in schemes if scheme.is_weight_only]
        others = [scheme for scheme in schemes if not scheme.is_weight_only]
        return [(*others, scheme) for scheme in weight_only] or [tuple(others)]


def _form_reasons(form: Form, scheme: QuantScheme) -> tuple[str, ...]:
    if form is Form.GPTQ and scheme.input_activations is not None:
        return ("GPTQ's form has weights only, activations stay bf16",)
    if form is Form.MODELOPT and scheme.weights is not None and scheme.name not in MODELOPT_ALGORITHMS:
        return ("ModelOpt has no name for it",)
    return ()


def _engine_reasons(engine: Engine, form: Form, scheme: QuantScheme) -> tuple[str, ...]:
    weights = scheme.weights
    if weights is None:
        return ()
    if engine is Engine.TRTLLM:
        fits = scheme.name == "w8a16_g-1_sym"
        return () if fits else ("its fused experts load W8A16 per channel alone of ModelOpt's schemes that exist here",)
    why = []
    if not weights.symmetric:
        why.append("experts need symmetric weights")
    if scheme.input_activations is None:
        if weights.num_bits not in (4, 8):
            why.append(f"weight-only experts have 4 or 8 bits, not {weights.num_bits}")
    elif scheme.activation_bits != 8:
        why.append("experts have no 4-bit integer activations")
    elif weights.num_bits == 8:
        if weights.strategy is not Strategy.CHANNEL:
            why.append("8-bit experts with 8-bit activations are scaled per channel")
    elif scheme.input_activations.type is NumericType.INT:
        why.append("4-bit weights with int8 activations run on CPUs only")
    elif engine is Engine.SGLANG or weights.num_bits != 4 or weights.group_size != 128:
        why.append("of fewer than 8 bits with e4m3 activations there is vLLM's 4 bits in groups of 128 only")
    return tuple(why)
