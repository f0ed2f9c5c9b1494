"""Formats: one object a scheme, that quantises, packs for the kernels, unpacks and dequantises. Torch, any device.

weights.py: floats <-> codes and scales. packing.py: codes <-> the kernels' bytes. activations.py: tokens.
reference.py: what a launch should give. tolerance.py: how far from it a right kernel may be.
"""

from kernel_gen.formats.activations import QuantizedActivations, dequantize_activations, quantize_activations
from kernel_gen.formats.format import Format, format_of
from kernel_gen.formats.packing import PackedWeights, pack, unpack
from kernel_gen.formats.reference import expected_output
from kernel_gen.formats.tolerance import Expected, check_output
from kernel_gen.formats.weights import QuantizedWeights, dequantize, quantize, require_weights

__all__ = [
    "Expected",
    "Format",
    "PackedWeights",
    "QuantizedActivations",
    "QuantizedWeights",
    "check_output",
    "dequantize",
    "dequantize_activations",
    "expected_output",
    "format_of",
    "pack",
    "quantize",
    "quantize_activations",
    "require_weights",
    "unpack",
]
