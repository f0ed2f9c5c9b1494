"""Build facts: what the compiler said about one kernel, as the latency model and the legality rules read them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from profiles.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFacts:
    """Resources of one compiled kernel.

    `ctas_per_sm` is the occupancy on the GPU the kernel was built for (`costmodel.occupancy`). `mma_instructions` are
    the opcodes found in the machine code, sorted. `fingerprint` names the machine code by content; it is empty when
    the facts were estimated, not read from a build.
    """

    registers_per_thread: int
    smem_bytes: int
    stack_bytes: int
    spill_bytes: int
    num_threads: int
    ctas_per_sm: int
    mma_instructions: tuple[str, ...]
    compile_seconds: float
    fingerprint: str

    @property
    def is_estimated(self) -> bool:
        """Whether no compiler has seen this kernel: the numbers come from the configuration alone."""
        return not self.fingerprint

    def to_json(self) -> str:
        """One JSON object with the fields' names as keys, keys sorted: equal facts give equal bytes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> BuildFacts:
        """The inverse of `to_json`. Raises DataError on anything else: missing or unknown fields, wrong types,
        negative numbers.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"build facts are not JSON: {error}") from error
        if not isinstance(data, dict):
            raise DataError(f"build facts must be a JSON object, not {type(data).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}
        if data.keys() != names:
            missing, unknown = sorted(names - data.keys()), sorted(data.keys() - names)
            raise DataError(f"build facts: missing fields {missing}, unknown fields {unknown}")
        wrong = [name for name in sorted(names) if not _is_valid(name, data[name])]
        if wrong:
            raise DataError("build facts: bad values " + ", ".join(f"{name}={data[name]!r}" for name in wrong))
        return cls(**{**data, "mma_instructions": tuple(data["mma_instructions"])})


def _is_valid(name: str, value: Any) -> bool:
    """Whether a decoded JSON value can be the field `name`."""
    if name == "mma_instructions":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name == "fingerprint":
        return isinstance(value, str)
    kinds = (int, float) if name == "compile_seconds" else (int,)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
