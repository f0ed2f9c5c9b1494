"""One object a scheme: everything that can be done with its tensors, under one name."""

from dataclasses import dataclass

from torch import Tensor

from kernel_gen.formats.activations import QuantizedActivations, dequantize_activations, quantize_activations
from kernel_gen.formats.packing import PackedWeights, pack, unpack
from kernel_gen.formats.weights import QuantizedWeights, dequantize, quantize
from kernel_gen.layouts import Layout, layout_of
from profiles.schemes import QuantScheme


@dataclass(frozen=True, slots=True)
class Format:
    """What a scheme's tensors are and become. Shapes and dtypes are those of the functions that each method names."""

    scheme: QuantScheme

    @property
    def layout(self) -> Layout:
        """The kernels' layout; UnsupportedError for a scheme without one, which can still be quantised."""
        return layout_of(self.scheme)

    def quantize(self, weights: Tensor) -> QuantizedWeights:
        """Float weights [E, N, K] or [N, K] to codes and scales: weights.quantize."""
        return quantize(weights, self.scheme)

    def dequantize(self, weights: QuantizedWeights) -> Tensor:
        """Codes and scales to float32 [E, N, K]: weights.dequantize."""
        return dequantize(weights)

    def pack(self, weights: QuantizedWeights) -> PackedWeights:
        """Codes and scales to what a launch reads: packing.pack."""
        return pack(weights)

    def unpack(self, packed: PackedWeights) -> QuantizedWeights:
        """The exact inverse of pack: packing.unpack."""
        return unpack(packed)

    def quantize_activations(self, x: Tensor) -> QuantizedActivations:
        """Tokens [T, K] to what a launch reads: activations.quantize_activations."""
        return quantize_activations(x, self.scheme)

    def dequantize_activations(self, x: QuantizedActivations) -> Tensor:
        """Quantised tokens to float32 [T, K]: activations.dequantize_activations."""
        return dequantize_activations(x)


def format_of(scheme: QuantScheme) -> Format:
    """The format of any scheme that can be constructed."""
    return Format(scheme)
