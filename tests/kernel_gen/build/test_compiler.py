import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_gen import compiler
from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact, CompileError, compile_kernel
from kernel_gen.pool import Failure, compile_into_cache
from profiles.errors import UserError
from profiles.records import Status
from tests.kernel_gen.build.specs import REFUSED, SMALL, kernel_spec


def test_object_is_written_and_nothing_else(small: Artifact, tmp_path: Path) -> None:
    artifact = compile_kernel(SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{SMALL.name}.o"]
    assert artifact.object_path.read_bytes() == small.object_path.read_bytes(), "the same spec gives the same bytes"
    assert artifact.compile_seconds > 0


def test_one_process_compiles_for_several_architectures(small: Artifact, tmp_path: Path) -> None:
    code = {arch: compile_kernel(kernel_spec("w8a8_g-1_sym", arch=arch), tmp_path).code for arch in ("sm_80", "sm_89")}
    assert {facts.mma_instructions for facts in code.values()} == {("IMMA.16832.S8.S8",)}


def test_refusal_by_the_compiler_names_the_kernel(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        compile_kernel(REFUSED, tmp_path)
    assert REFUSED.label in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_mlir_does_not_verify_is_a_refusal_of_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLIR's own error is not one of the DSL's: it too says something about this kernel alone."""
    import cutlass.cute as cute
    from cutlass._mlir import ir

    def refuse(*_: object, **__: object) -> None:
        with ir.Context():
            ir.Module.parse("no module")

    monkeypatch.setattr(cute, "compile", refuse)
    with pytest.raises(CompileError, match=re.escape(SMALL.label)) as caught:
        compile_kernel(SMALL, tmp_path)
    assert isinstance(caught.value.__cause__, ir.MLIRError)
    outcome = compile_into_cache(SMALL, KernelCache(root=tmp_path))
    assert isinstance(outcome, Failure)
    assert outcome.status is Status.COMPILE_ERROR
    assert SMALL.label in outcome.error


def test_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "DSL_PACKAGE", "not-installed-anywhere")
    with pytest.raises(UserError, match=r"pip install 'bitile\[compile\]'"):
        compiler.dsl_version()


def test_importing_the_build_imports_neither_cutlass_nor_torch() -> None:
    code = "import sys, kernel_gen.build; print(sorted({'cutlass', 'torch', 'tvm_ffi'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
