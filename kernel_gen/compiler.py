"""One kernel from its spec: an object file to link, with what its machine code shows, or a function to call at once.

Compiling needs no GPU and no CUDA toolkit: the target is an option, so that one process compiles for every
architecture.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import re
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costmodel.facts import BuildFacts
from kernel_gen.gate import CodeFacts, build_facts, inspect_cubin, rejections
from kernel_gen.kernels import KernelSpec, StepSpec, entry
from kernel_gen.timing import monotonic_s
from profiles.errors import BitileError, UnsupportedError, UserError
from profiles.gpus import GpuSpec
from profiles.kernels import Family

DSL_PACKAGE = "nvidia-cutlass-dsl"
MAX_MESSAGE = 400
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_installed_version = functools.cache(importlib.metadata.version)
"""Asked for every kernel that is looked up; reading a package's metadata takes half a millisecond."""


class CompileError(BitileError):
    """The compiler refused a kernel: a finding about that kernel, not a user's mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One compiled kernel. `object_path` exports its entry as `spec.name`; `code` holds on every GPU of `spec.arch`."""

    spec: KernelSpec
    object_path: Path
    code: CodeFacts
    compile_seconds: float

    def facts(self, gpu: GpuSpec) -> BuildFacts:
        """What the latency model reads, on this GPU."""
        return build_facts(self.code, self.spec, gpu, compile_seconds=self.compile_seconds)


def dsl_version() -> str:
    """The version of the compiler, which decides the machine code. UserError when it is not installed."""
    try:
        return _installed_version(DSL_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{DSL_PACKAGE} is not installed, so no kernel can be compiled: pip install 'bitile[compile]'"
        ) from None


def compile_kernel(spec: KernelSpec, out_dir: Path) -> Artifact:
    """Compile `spec` and write `{spec.name}.o` into `out_dir`, an existing folder. CompileError when the compiler
    refuses it.
    """
    with tempfile.TemporaryDirectory(prefix=".dump-", dir=out_dir) as scratch:
        started = monotonic_s()
        compiled, log = _compile_with_log(spec, scratch)
        object_path = out_dir / f"{spec.name}.o"
        compiled.export_to_c(str(object_path), function_name=spec.name)
        seconds = monotonic_s() - started
        code = _inspected(compiled, spec, scratch, log)
    return Artifact(spec=spec, object_path=object_path, code=code, compile_seconds=seconds)


def _compile_with_log(spec: KernelSpec, scratch: str) -> tuple[Any, str]:
    """The compiler's function, and what ptxas said."""
    # Only wgmma can be serialised behind our back, and asking for ptxas's log compiles the kernel twice.
    with_log = spec.config.family is Family.WGMMA
    with contextlib.redirect_stderr(io.StringIO()) as log:
        compiled = _compile(spec, f"--keep-cubin --dump-dir {scratch}" + (" remarks{ptx}" if with_log else ""))
    return compiled, log.getvalue()


def _inspected(compiled: Any, spec: KernelSpec | StepSpec, scratch: str, log: str = "") -> CodeFacts:
    """What the machine code shows."""
    cubin = Path(scratch, f"{spec.name}.cubin")
    cubin.write_bytes(compiled.__cubin__)
    return inspect_cubin(cubin, arch=spec.arch, ptxas_log=log)


def inspect_step(spec: StepSpec) -> CodeFacts:
    """Compile a step and read its machine code. CompileError when the compiler refuses it."""
    with tempfile.TemporaryDirectory(prefix="bitile-step-") as scratch:
        return _inspected(_compile(spec, f"--keep-cubin --dump-dir {scratch}"), spec, scratch)


def export_step(spec: StepSpec, path: Path) -> None:
    """Compile a step into an object file that exports its entry as `spec.name`. CompileError when the compiler refuses
    it.
    """
    _compile(spec, "").export_to_c(str(path), function_name=spec.name)


def load_gated(spec: KernelSpec, gpu: GpuSpec) -> tuple[Callable[..., None], BuildFacts]:
    """Compile `spec` into this process, and its facts on this GPU. UnsupportedError with the gate's reasons, if it has
    any.
    """
    started = monotonic_s()
    with tempfile.TemporaryDirectory(prefix="bitile-kernel-") as scratch:
        compiled, log = _compile_with_log(spec, scratch)
        code = _inspected(compiled, spec, scratch, log)
    if found := rejections(code, spec, gpu):
        raise UnsupportedError(spec.label, found)
    return compiled, build_facts(code, spec, gpu, compile_seconds=monotonic_s() - started)


def load_in_process(spec: KernelSpec | StepSpec) -> Callable[..., None]:
    """Compile `spec` into this process, which has a GPU of `spec.arch`, past the gate: the function takes the entry's
    arguments of ARCHITECTURE.md, a step's those of its `__call__`.
    """
    function: Callable[..., None] = _compile(spec, "")
    return function


def _compile(spec: KernelSpec | StepSpec, options: str) -> Any:
    import cutlass.cute as cute
    from cutlass._mlir.ir import MLIRError
    from cutlass.base_dsl.common import DSLBaseError

    kernel, fake_arguments = entry(spec)
    try:
        return cute.compile(kernel, *fake_arguments, options=f"--enable-tvm-ffi --gpu-arch {spec.arch} {options}")
    except (DSLBaseError, MLIRError) as error:
        raise CompileError(f"{spec.label}: {_plain(str(error))}") from error


def _plain(text: str) -> str:
    """The compiler's message on one line, without its colours and, if it is long, without its end."""
    return textwrap.shorten(_COLOUR.sub("", text), MAX_MESSAGE, placeholder=" ...")
