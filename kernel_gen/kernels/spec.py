"""What one compiled kernel is: a configuration, the schemes of its slots, a target. Importable without CUTLASS."""

import ast
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from profiles.kernels import Family, KernelConfig
from profiles.schemes import QuantScheme

MAX_SLOTS = 4
FIRST_OVERLAPPING = 90
KERNEL_ABI = 1
"""Goes up when the entry's arguments or the packed layouts change: an old bundle is then refused."""


def can_overlap(arch: str) -> bool:
    """Whether kernels for this target may start before the one ahead of them has ended."""
    return int(arch.removeprefix("sm_").rstrip("af")) >= FIRST_OVERLAPPING


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel to compile. Slot i of a launch runs schemes[i]; arch is the target, such as sm_89.

    `swiglu`: Y is silu(gate) * up of rows that Experts.interleaved has put together. `overlap`: the kernel is launched
    while the one before it ends, and waits for that one's results itself (programmatic dependent launch, sm_90 on).
    `prefetch`: besides, offsets and weights were there before that one was launched, so that tiles are listed and the
    first weights asked for before waiting.
    """

    config: KernelConfig
    schemes: tuple[QuantScheme, ...]
    arch: str
    max_experts: int = 256
    swiglu: bool = False
    overlap: bool = False
    prefetch: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.schemes) <= MAX_SLOTS:
            raise ValueError(f"a kernel has 1 to {MAX_SLOTS} schemes, got {len(self.schemes)}")
        if len(set(self.schemes)) != len(self.schemes):
            raise ValueError(f"schemes of a kernel are distinct, got {[s.name for s in self.schemes]}")
        if self.max_experts < 32 or self.max_experts > 1024 or self.max_experts & (self.max_experts - 1):
            raise ValueError(f"max_experts is a power of two in 32..1024, got {self.max_experts}")
        if self.overlap and not can_overlap(self.arch):
            raise ValueError(f"overlap: {self.arch} has no programmatic dependent launch, sm_90 and later do")
        if self.prefetch and not self.overlap:
            raise ValueError("prefetch: a kernel that does not overlap the one ahead has no time before it")

    @property
    def label(self) -> str:
        """Readable: config, schemes, target."""
        schemes = "+".join(scheme.name for scheme in self.schemes)
        suffix = "/swiglu" * self.swiglu + "/overlap" * self.overlap + "/prefetch" * self.prefetch
        return f"{self.config.name}/{schemes}/{self.arch}/e{self.max_experts}{suffix}"

    @property
    def name(self) -> str:
        """A C identifier that only this spec has."""
        return "bitile_" + hashlib.sha256(self.label.encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Changes when the spec or any source that decides its machine code changes."""
        return hashlib.sha256(f"{self.label}|{source_digest(self.config.family)}".encode()).hexdigest()[:16]


ENTRY_MODULE = {Family.MMA: "kernel_gen.kernels.mma", Family.WGMMA: "kernel_gen.kernels.wgmma"}
"""Where each family's `entry` is; a family that is not here cannot be generated."""


def source_digest(family: Family) -> str:
    """SHA-256 over the sources that decide what machine code a family's specs become."""
    return module_digest(ENTRY_MODULE[family])


@functools.cache
def module_digest(entry_module: str) -> str:
    """SHA-256 over the sources of an entry's module and all of kernel_gen it imports."""
    digest = hashlib.sha256(str(KERNEL_ABI).encode())
    for module in sorted(_closure(entry_module) - {__name__}):  # this module only describes: the label stands for it
        digest.update(module.encode() + _source(module).read_bytes())
    return digest.hexdigest()


def _closure(module: str) -> set[str]:
    """The module and every module of kernel_gen that it imports, directly or not, read from the sources: nothing is
    executed.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(_source(name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kernel_gen"):
                waiting += [full for alias in node.names if _is_module(full := f"{node.module}.{alias.name}")]
                waiting += [node.module] if _is_module(node.module) else []
    return found


def _source(module: str) -> Path:
    return Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")


def _is_module(name: str) -> bool:
    """Whether this is a module of its own; a package's __init__ only re-exports."""
    return _source(name).is_file()
