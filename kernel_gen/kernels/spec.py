"""What one compiled kernel is: a configuration, the schemes of its slots, a target. Importable without CUTLASS."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

MAX_SLOTS = 4
KERNEL_ABI = 1
"""Goes up when the entry's arguments or the packed layouts change: an old bundle is then refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel to compile. Slot i of a launch runs schemes[i]; arch is the target, such as sm_89."""

    config: KernelConfig
    schemes: tuple[QuantScheme, ...]
    arch: str
    max_experts: int = 256

    def __post_init__(self) -> None:
        if not 1 <= len(self.schemes) <= MAX_SLOTS:
            raise ValueError(f"a kernel has 1 to {MAX_SLOTS} schemes, got {len(self.schemes)}")
        if len(set(self.schemes)) != len(self.schemes):
            raise ValueError(f"schemes of a kernel are distinct, got {[s.name for s in self.schemes]}")
        if self.max_experts < 32 or self.max_experts > 1024 or self.max_experts & (self.max_experts - 1):
            raise ValueError(f"max_experts is a power of two in 32..1024, got {self.max_experts}")

    @property
    def label(self) -> str:
        """Readable: config, schemes, target."""
        return f"{self.config.name}/{'+'.join(s.name for s in self.schemes)}/{self.arch}/e{self.max_experts}"

    @property
    def name(self) -> str:
        """A C identifier that only this spec has."""
        return "bitile_" + hashlib.sha256(self.label.encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Changes when the spec or any source that generates kernels changes."""
        return hashlib.sha256(f"{self.label}|{source_digest()}".encode()).hexdigest()[:16]


@functools.cache
def source_digest() -> str:
    """SHA-256 over the sources that decide what machine code a spec becomes."""
    here = Path(__file__).parent
    digest = hashlib.sha256(str(KERNEL_ABI).encode())
    for path in sorted([*here.glob("*.py"), here.parent / "layouts.py", here.parent / "smem.py"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
