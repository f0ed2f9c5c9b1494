"""One measurement or prediction: a row of the profile store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from hashlib import blake2b
from typing import Any

import numpy as np

from profiles import kernels, schemes
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

SCHEMA_VERSION = 1
SEPARATOR = "\x1f"  # between the texts of a key; no name has it


class Status(Enum):
    """How a candidate ended."""

    OK = "ok"
    COMPILE_ERROR = "compile_error"
    REJECTED = "rejected"  # built, but refused by the build gate
    LAUNCH_ERROR = "launch_error"
    WRONG = "wrong"  # its values differ from the reference
    TIMEOUT = "timeout"
    CRASHED = "crashed"  # it took its worker process with it


class Source(Enum):
    """Whether a GPU ran it."""

    MEASURED = "measured"
    PREDICTED = "predicted"


def utc_now() -> str:
    """The time as rows keep it, e.g. `2026-11-23T08:15:00+00:00`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRecord:
    """One candidate's outcome on one GPU. `profiles.table` states the rules that a row must meet; the store refuses one
    that breaks them.

    Attributes:
        gpu: a name in `profiles.gpus.GPUS`.
        model: a model's name, or any label of a made-up shape.
        linear: `gate_up`, `down`, `shared_gate_up` or `shared_down`, as `LayerGemm.name`, or any label.
        n, k: output and input features of one expert.
        load: tokens per expert.
        schemes: one scheme that all experts use, or one per expert.
        config: the kernel's configuration.
        status, error: how it ended, and in which words if not well.
        latency_us, p20_us, p80_us: median and quantiles of a launch; None unless `status` is OK. A prediction's
            quantiles are its interval, or None.
        num_samples: launches timed; 0 of a prediction.
        sm_clock_mhz: SM clock while it was timed; None if unknown.
        source: measured or predicted.
        kernel_fingerprint: of the machine code that ran, or "" if there was none.
        versions: of what could matter, e.g. driver, torch, dsl, bitile.
        timestamp: UTC, ISO 8601.
        schema_version: of the row's columns.
    """

    gpu: str
    model: str
    linear: str
    n: int
    k: int
    load: TokenLoad
    schemes: tuple[QuantScheme, ...]
    config: KernelConfig
    status: Status
    source: Source
    error: str = ""
    latency_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    num_samples: int = 0
    sm_clock_mhz: float | None = None
    kernel_fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    timestamp: str = field(default_factory=utc_now)
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> str:
        """What identifies the candidate; see `candidate_key`."""
        return candidate_key(
            gpu=self.gpu,
            model=self.model,
            linear=self.linear,
            n=self.n,
            k=self.k,
            tokens_per_expert=self.load.tokens_per_expert,
            schemes=_names(self.schemes),
            config=self.config.name,
            source=self.source.value,
            kernel_fingerprint=self.kernel_fingerprint,
        )

    def to_row(self) -> dict[str, Any]:
        """The columns of the store, as plain values."""
        return {
            "gpu": self.gpu,
            "model": self.model,
            "linear": self.linear,
            "n": self.n,
            "k": self.k,
            "num_experts": self.load.num_experts,
            "tokens_per_expert": list(self.load.tokens_per_expert),
            "load_source": self.load.source,
            "num_tokens": self.load.num_tokens,
            "schemes": list(_names(self.schemes)),
            "config": self.config.name,
            "status": self.status.value,
            "error": self.error,
            "latency_us": self.latency_us,
            "p20_us": self.p20_us,
            "p80_us": self.p80_us,
            "num_samples": self.num_samples,
            "sm_clock_mhz": self.sm_clock_mhz,
            "source": self.source.value,
            "kernel_fingerprint": self.kernel_fingerprint,
            "versions": dict(self.versions),
            "timestamp": self.timestamp,
            "schema_version": self.schema_version,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ProfileRecord:
        """The record of `to_row`'s columns (plain values, None for what is absent)."""
        rest = {name: row[name] for name in _SAME_IN_ROW}
        return cls(
            load=load_of_row(row),
            schemes=tuple(schemes.parse(name) for name in row["schemes"]),
            config=kernels.parse(row["config"]),
            status=Status(row["status"]),
            source=Source(row["source"]),
            versions=dict(row["versions"]),
            **rest,
        )


def load_of_row(row: Mapping[str, Any]) -> TokenLoad:
    """The token load of a row of the store; `num_tokens` may be None or NaN where it is not known."""
    batch = row["num_tokens"]
    return TokenLoad(
        tokens_per_expert=tuple(int(count) for count in row["tokens_per_expert"]),
        source=row["load_source"],
        num_tokens=None if batch is None or batch != batch else int(batch),
    )


_SAME_IN_ROW = (
    *("gpu", "model", "linear", "n", "k", "error", "latency_us", "p20_us", "p80_us"),
    *("num_samples", "sm_clock_mhz", "kernel_fingerprint", "timestamp", "schema_version"),
)


def candidate_key(
    *,
    gpu: str,
    model: str,
    linear: str,
    n: int,
    k: int,
    tokens_per_expert: Sequence[int],
    schemes: Sequence[str],
    config: str,
    source: str,
    kernel_fingerprint: str,
) -> str:
    """A digest of what was run: GPU, problem, load, schemes, configuration, kernel and whether it was measured; not of
    how it went.

    The kernel's fingerprint is part of it, so that a changed kernel is measured anew beside the old rows.
    """
    texts = (gpu, model, linear, str(n), str(k), config, source, kernel_fingerprint, *schemes)
    return candidate_digest(SEPARATOR.join(texts).encode(), np.asarray(tokens_per_expert, dtype="<i4").tobytes())


def candidate_digest(texts: bytes, tokens_per_expert: bytes | memoryview) -> str:
    """`candidate_key` of texts that are joined already and of little-endian 32-bit numbers of tokens."""
    digest = blake2b(texts, digest_size=16)
    digest.update(tokens_per_expert)
    return digest.hexdigest()


def _names(all_schemes: Sequence[QuantScheme]) -> tuple[str, ...]:
    """The experts' schemes as rows keep them: one name when all are equal."""
    names = tuple(scheme.name for scheme in all_schemes)
    return names[:1] if len(set(names)) == 1 else names
