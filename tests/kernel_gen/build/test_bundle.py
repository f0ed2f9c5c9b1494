import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernel_gen import bundle as bundle_module
from kernel_gen.bundle import MANIFEST_NAME, RefusedKernel, load_bundle, write_bundle
from kernel_gen.compiler import Artifact
from kernel_gen.kernels import KERNEL_ABI
from kernel_gen.linker import LinkError, c_compiler, link
from profiles.errors import DataError, UserError
from profiles.records import Status
from tests.kernel_gen.build.specs import RTX4090, SMALL, SPILLING

REFUSED_KERNEL = RefusedKernel(spec=SPILLING, status=Status.REJECTED, reasons=("spills 8 bytes", "stack of 8 bytes"))


@pytest.fixture
def folder(small: Artifact, tmp_path: Path) -> Path:
    """A bundle of one kernel, and one that was refused."""
    return write_bundle(tmp_path / "bundle", RTX4090, [small], [REFUSED_KERNEL]).path


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_bundle_says_what_it_holds(folder: Path, small: Artifact) -> None:
    bundle = load_bundle(folder)
    assert bundle.gpu is RTX4090
    (kernel,) = bundle.kernels
    assert kernel.spec == SMALL
    assert kernel.facts == small.facts(RTX4090)
    assert kernel.fingerprint == SMALL.fingerprint()
    assert bundle.refused == (REFUSED_KERNEL,)
    assert len(bundle.fingerprint) == 32


def test_kernels_load_without_a_gpu(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert callable(bundle.function(bundle.kernels[0]))


def test_library_needs_only_libc_and_a_loaded_tvm_ffi(folder: Path) -> None:
    (library,) = folder.glob("*.so")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    assert {name.split(".")[0] for name in needed} <= {"libc", "ld-linux-x86-64", "ld-linux-aarch64", "libm", "libdl"}
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout.splitlines()
    undefined = {line.split()[-1] for line in symbols if " U " in line and "GLIBC" not in line}
    assert {name[:6] for name in undefined} == {"TVMFFI"}
    assert [line.split()[-1] for line in symbols if " T " in line] == [f"__tvm_ffi_{SMALL.name}"]


def test_bundle_is_read_without_torch_and_run_without_the_compiler(folder: Path) -> None:
    code = f"""
import sys
from kernel_gen.bundle import load_bundle
bundle = load_bundle({str(folder)!r})
print(sorted({{"cutlass", "torch", "tvm_ffi"}} & set(sys.modules)))
bundle.function(bundle.kernels[0])
print(sorted({{"cutlass", "tvm_ffi"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['tvm_ffi']"]


def test_same_content_is_kept_and_other_content_replaces_it(folder: Path, small: Artifact) -> None:
    before = files(folder)
    write_bundle(folder, RTX4090, [small], [REFUSED_KERNEL])
    assert files(folder) == before
    write_bundle(folder, RTX4090, [small], [])
    assert load_bundle(folder).refused == ()
    assert len(list(folder.glob("*.so"))) == 1


def test_damaged_bundle_is_written_again(folder: Path, small: Artifact) -> None:
    (library,) = folder.glob("*.so")
    library.unlink()
    write_bundle(folder, RTX4090, [small], [REFUSED_KERNEL])
    assert load_bundle(folder).kernels[0].spec == SMALL


def test_many_kernels_take_several_libraries(
    small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Artifact
) -> None:
    monkeypatch.setattr(bundle_module, "KERNELS_PER_LIBRARY", 1)
    bundle = write_bundle(tmp_path, RTX4090, [small, other], [])
    assert len({kernel.library for kernel in bundle.kernels}) == 2
    for kernel in bundle.kernels:
        assert callable(bundle.function(kernel))


def test_no_kernel_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kernel passed the gate"):
        write_bundle(tmp_path / "bundle", RTX4090, [], [REFUSED_KERNEL])
    assert not (tmp_path / "bundle").exists()


def test_machine_without_a_c_compiler_links_with_zig(
    small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ziglang")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert c_compiler() == [sys.executable, "-m", "ziglang", "cc"]
    bundle = write_bundle(tmp_path / "bundle", RTX4090, [small], [])
    assert callable(bundle.function(bundle.kernels[0]))


def test_linker_that_fails_says_why(small: Artifact, tmp_path: Path) -> None:
    broken = tmp_path / "broken.o"
    broken.write_bytes(b"not an object")
    with pytest.raises(LinkError, match=r"kernels\.so"):
        link([broken], tmp_path / "kernels.so")


def edit(change: Callable[[dict[str, Any]], None], *, sign: bool) -> Callable[[Path], None]:
    """Change the manifest; with `sign`, as a program would that writes another schema."""

    def apply(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        body = json.loads(path.read_text())
        change(body)
        if sign:
            body["fingerprint"] = bundle_module._fingerprint({k: v for k, v in body.items() if k != "fingerprint"})
        path.write_text(json.dumps(body))

    return apply


def rewrite(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST_NAME).write_text(text) and None


def cut_manifest(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-40])


def cut_library(folder: Path) -> None:
    (library,) = folder.glob("*.so")
    os.truncate(library, 4096)


def lose_library(folder: Path) -> None:
    next(folder.glob("*.so")).unlink()


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lose_manifest, "it has no manifest.json"),
        (cut_manifest, "is not a whole manifest"),
        (rewrite("\x00\x01"), "is not a whole manifest"),
        (rewrite("[]"), "is not the manifest of a bundle"),
        (rewrite('{"name": "somebody\'s"}'), "is not the manifest of a bundle"),
        (edit(lambda body: body.update(schema_version=99), sign=True), "has schema version 99, this version reads 1"),
        (edit(lambda body: body["content"].update(gpu="h200"), sign=False), "was changed after it was written"),
        (edit(lambda body: body.pop("fingerprint"), sign=False), "was changed after it was written"),
        (
            edit(lambda body: body["content"].update(kernel_abi=KERNEL_ABI + 1), sign=True),
            f"has kernel interface {KERNEL_ABI + 1}, this version calls {KERNEL_ABI}",
        ),
        (edit(lambda body: body["content"].update(gpu="gtx9999"), sign=True), "something unknown"),
        (edit(lambda body: body["content"]["kernels"][0].update(schemes=["w5a5"]), sign=True), "something unknown"),
        (edit(lambda body: body["content"]["kernels"][0].pop("facts"), sign=True), "something unknown"),
        (edit(lambda body: body.update(libraries={}), sign=True), "something unknown"),
        (cut_library, "is damaged: its SHA-256"),
        (lose_library, "lacks its library"),
    ],
)
def test_what_is_not_a_whole_bundle_is_refused(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    with pytest.raises(DataError) as caught:
        load_bundle(folder)
    assert sentence in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_is_not_a_bundle(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    with pytest.raises(DataError, match="is not a folder"):
        load_bundle(path)


def test_fingerprint_follows_content(small: Artifact, tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "a", RTX4090, [small], [])
    same = write_bundle(tmp_path / "b", RTX4090, [small], [])
    slower = write_bundle(tmp_path / "c", RTX4090, [dataclasses.replace(small, compile_seconds=9.0)], [])
    assert first.fingerprint == same.fingerprint != slower.fingerprint
