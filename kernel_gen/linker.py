"""Object files into one shared library, with pip's wheels alone.

The linker is the machine's C compiler, or zig's from the wheel ziglang where there is none. Only the kernels' entries
are exported: the DSL's static launch code and the static CUDA run time (wheel nvidia-cuda-runtime) stay inside, so that
the library needs nothing but libc, the driver and a loaded tvm-ffi.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from profiles.errors import UserError

ERRORS_SOURCE = Path(__file__).with_name("bundle_errors.c")
CUDA_MAJOR = "cu13"
MAX_MESSAGE = 400
EXPORTS = "{ global: __tvm_ffi_*; local: *; };\n"
"""A linker's version script: the names that tvm-ffi looks for, and no others."""


class LinkError(UserError):
    """The linker failed: a disk is full, or the C compiler is broken."""


def link(objects: Sequence[Path], library: Path) -> None:
    """Link `objects` into `library`. UserError when a wheel that linking needs is missing; LinkError when the linker
    fails.
    """
    with tempfile.TemporaryDirectory(prefix="bitile-link-") as scratch:
        exports = Path(scratch, "exports.map")
        exports.write_text(EXPORTS)
        flags = ["-shared", "-fPIC", "-O1", f"-Wl,--version-script={exports}", "-o", str(library)]
        done = subprocess.run(
            [*c_compiler(), *flags, *objects, ERRORS_SOURCE, *static_libraries(), "-ldl", "-lrt", "-lpthread"],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        why = textwrap.shorten(done.stderr, MAX_MESSAGE, placeholder=" ...") or f"exit code {done.returncode}"
        raise LinkError(f"linking {library} failed: {why}")


def check_installed() -> None:
    """UserError when what linking needs is not there: cheaper to learn before hundreds of kernels are compiled."""
    c_compiler()
    static_libraries()


def static_libraries() -> list[Path]:
    """The static libraries that a bundle carries, from pip's wheels."""
    dialect = f"{CUDA_MAJOR}/lib/libcuda_dialect_runtime_static.a"
    return [
        _wheel_file("nvidia_cutlass_dsl", dialect, "nvidia-cutlass-dsl[cu13]"),
        _wheel_file("nvidia", f"{CUDA_MAJOR}/lib/libcudart_static.a", "nvidia-cuda-runtime"),
    ]


def c_compiler() -> list[str]:
    """The command that compiles and links C here: cc, gcc or clang, else zig's."""
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang") is None:
        raise UserError("there is neither a C compiler nor zig to link with: pip install ziglang")
    return [sys.executable, "-m", "ziglang", "cc"]


def _wheel_file(package: str, name: str, wheel: str) -> Path:
    spec = importlib.util.find_spec(package)
    for root in spec.submodule_search_locations or () if spec else ():
        if (path := Path(root, name)).exists():
            return path
    raise UserError(f"{Path(name).name} was not found: pip install '{wheel}'")
