"""A bundle: the kernels built for one GPU in shared libraries, and a manifest that says what they are.

`write_bundle` makes one, `load_bundle` opens one. What loads a bundle needs neither the DSL nor a compiler nor a CUDA
toolkit: a library carries the static CUDA run time, and its functions are called through apache-tvm-ffi. Opening one to
read it needs nothing at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costmodel.facts import BuildFacts
from kernel_gen.compiler import Artifact
from kernel_gen.kernels import KERNEL_ABI, KernelSpec
from kernel_gen.linker import link
from profiles import gpus, kernels, schemes
from profiles.atomic import replacing
from profiles.errors import BitileError, DataError, UserError
from profiles.gpus import GpuSpec
from profiles.records import Status

FORMAT = "bitile-bundle"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
OPTIONS = ("swiglu", "overlap", "prefetch")
"""Of a KernelSpec; a manifest names those that are on."""
KERNELS_PER_LIBRARY = 512
"""About 20 MB: a quick build is one library, a full one some dozens, of which a process loads those it calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledKernel:
    """One kernel of a bundle. `fingerprint` is that of the spec and the sources it was built from, which need not be
    this checkout's.
    """

    spec: KernelSpec
    symbol: str
    library: Path
    facts: BuildFacts
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedKernel:
    """A kernel that was tried and is not in the bundle, with every reason: the gate rejected it, or it could not be
    compiled.
    """

    spec: KernelSpec
    status: Status
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle. `fingerprint` names its content."""

    path: Path
    gpu: GpuSpec
    kernels: tuple[BundledKernel, ...]
    refused: tuple[RefusedKernel, ...]
    fingerprint: str

    def function(self, kernel: BundledKernel) -> Callable[..., None]:
        """One kernel's entry, as ARCHITECTURE.md gives its arguments; its library is loaded at the first call. Calling
        the entry needs the GPU.
        """
        function: Callable[..., None] = _load_library(kernel.library)[kernel.symbol]
        return function


def write_bundle(
    out_dir: Path, gpu: GpuSpec, artifacts: Sequence[Artifact], refused: Sequence[RefusedKernel]
) -> Bundle:
    """Link `artifacts` into a bundle in `out_dir`, replacing the one that is there; one with the same content is kept
    as it is.

    The manifest is replaced last and by one rename, so that a reader sees the old bundle or the new one.
    UserError when there is no kernel or a part needed for linking is missing.
    """
    content = _content(gpu, artifacts, refused)
    with contextlib.suppress(DataError, FileNotFoundError):
        if _read_manifest(out_dir)["content"] == content:
            return load_bundle(out_dir)
    if not artifacts:
        raise UserError("no kernel passed the gate, so there is nothing to bundle: --explain shows the reasons")
    out_dir.mkdir(parents=True, exist_ok=True)
    with _locked(out_dir), tempfile.TemporaryDirectory(prefix=".new-", dir=out_dir) as scratch:
        libraries = {}
        for batch in _batches([artifact.object_path for artifact in artifacts]):
            linked = Path(scratch, "kernels.so")
            link(batch, linked)
            digest = _sha256(linked.read_bytes())
            linked.replace(out_dir / f"kernels-{digest[:16]}.so")
            libraries[f"kernels-{digest[:16]}.so"] = digest
        body = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "content": content, "libraries": libraries}
        with replacing(out_dir / MANIFEST_NAME) as manifest:
            manifest.write_text(json.dumps({**body, "fingerprint": _fingerprint(body)}, indent=1) + "\n")
        for old in out_dir.glob("kernels-*.so"):
            if old.name not in libraries:
                old.unlink()
    return load_bundle(out_dir)


def load_bundle(path: Path | str) -> Bundle:
    """Open the bundle in the folder `path`. Imports neither the DSL nor torch; loads no code.

    DataError, in one sentence, for what is not a whole bundle that this version can run: no manifest, a foreign or
    truncated file, another schema or kernel interface, a library that is missing or not the one the manifest describes.
    """
    path = Path(path)
    try:
        body = _read_manifest(path)
    except FileNotFoundError:
        raise DataError(
            f"{path} is not a bundle: it has no {MANIFEST_NAME}; make one with python -m kernel_gen.build"
        ) from None
    content = body["content"]
    if content.get("kernel_abi") != KERNEL_ABI:
        raise DataError(
            f"{path} has kernel interface {content.get('kernel_abi')}, this version calls {KERNEL_ABI}: build it again"
        )
    try:
        names = list(body["libraries"])
        bundle = Bundle(
            path=path,
            gpu=gpus.gpu(content["gpu"]),
            kernels=tuple(
                _kernel(item, path / names[i // KERNELS_PER_LIBRARY]) for i, item in enumerate(content["kernels"])
            ),
            refused=tuple(
                RefusedKernel(spec=_spec(item), status=Status(item["status"]), reasons=tuple(item["reasons"]))
                for item in content["refused"]
            ),
            fingerprint=body["fingerprint"],
        )
    except (LookupError, TypeError, ValueError, BitileError) as error:
        unknown = f"describes something unknown to this version ({error})"
        raise DataError(f"{path / MANIFEST_NAME} {unknown}: build it again") from error
    for name, digest in body["libraries"].items():
        _check_library(path / name, digest)
    return bundle


def _check_library(library: Path, digest: str) -> None:
    try:
        found = _sha256(library.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{library.parent} lacks its library {library.name}: build it again") from None
    if found != digest:
        raise DataError(
            f"{library} is damaged: its SHA-256 is {found[:16]}..., the manifest says {digest[:16]}...: build it again"
        )


def _batches(objects: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for start in range(0, len(objects), KERNELS_PER_LIBRARY):
        yield objects[start : start + KERNELS_PER_LIBRARY]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time: the second waits."""
    with Path(folder, ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _content(gpu: GpuSpec, artifacts: Sequence[Artifact], refused: Sequence[RefusedKernel]) -> dict[str, Any]:
    kernels_ = [
        {
            **_describe(item.spec),
            "symbol": item.spec.name,
            "facts": json.loads(item.facts(gpu).to_json()),
            "fingerprint": item.spec.fingerprint(),
        }
        for item in artifacts
    ]
    refused_ = [
        {**_describe(item.spec), "status": item.status.value, "reasons": list(item.reasons)} for item in refused
    ]
    return {"gpu": gpu.name, "arch": gpu.arch, "kernel_abi": KERNEL_ABI, "kernels": kernels_, "refused": refused_}


def _describe(spec: KernelSpec) -> dict[str, Any]:
    return {
        "config": spec.config.name,
        "schemes": [scheme.name for scheme in spec.schemes],
        "arch": spec.arch,
        "max_experts": spec.max_experts,
        **{name: True for name in OPTIONS if getattr(spec, name)},
    }


def _spec(item: dict[str, Any]) -> KernelSpec:
    return KernelSpec(
        config=kernels.parse(item["config"]),
        schemes=tuple(schemes.parse(name) for name in item["schemes"]),
        arch=item["arch"],
        max_experts=item["max_experts"],
        **{name: bool(item.get(name, False)) for name in OPTIONS},
    )


def _kernel(item: dict[str, Any], library: Path) -> BundledKernel:
    facts = BuildFacts.from_json(json.dumps(item["facts"]))
    return BundledKernel(
        spec=_spec(item), symbol=item["symbol"], library=library, facts=facts, fingerprint=item["fingerprint"]
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whole and of this schema. FileNotFoundError when there is none."""
    path = folder / MANIFEST_NAME
    try:
        body = json.loads(path.read_text())
    except NotADirectoryError:
        raise DataError(f"{folder} is not a folder: a bundle is one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not a whole manifest ({error}): build it again") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a bundle: its format is not {FORMAT!r}")
    if body.get("schema_version") != SCHEMA_VERSION:
        version = body.get("schema_version")
        raise DataError(f"{path} has schema version {version!r}, this version reads {SCHEMA_VERSION}: build it again")
    stated = body.pop("fingerprint", None)
    if stated != _fingerprint(body) or not isinstance(body.get("content"), dict):
        raise DataError(f"{path} was changed after it was written: its fingerprint does not match; build it again")
    return {**body, "fingerprint": stated}


def _fingerprint(body: dict[str, Any]) -> str:
    return _sha256(json.dumps(body, sort_keys=True).encode())[:32]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.cache
def _load_library(library: Path) -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(library))
