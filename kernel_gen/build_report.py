"""What a build shows at its end: a table, and every rejection with its reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from profiles.schemes import QuantScheme

if TYPE_CHECKING:
    from kernel_gen.build import BuildRequest, BuildResult, Plan

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Reasons that differ in their numbers only: how many, and one of them."""

    count: int
    example: str


def count_kinds(reasons: Iterable[tuple[str, ...]]) -> list[Kind]:
    """The kinds of reasons, the most frequent first."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for reason in (reason for several in reasons for reason in several):
        pattern = _NUMBER.sub("#", reason)
        counts[pattern] += 1
        examples.setdefault(pattern, reason)
    return [Kind(count=count, example=examples[pattern]) for pattern, count in counts.most_common()]


def print_rejected(plan: Plan, file: TextIO) -> None:
    """Every configuration that the rules rejected, with all reasons, then how often each kind of reason came."""
    for item in plan.rejected:
        print(f"{_names(item.slots)} {item.config.name}: {'; '.join(item.reasons)}", file=file)
    print(f"{len(plan.rejected)} configurations rejected before compiling, {len(plan.specs)} left", file=file)
    for kind in count_kinds(item.reasons for item in plan.rejected):
        print(f"{kind.count:8d}  {kind.example}", file=file)


def print_result(request: BuildRequest, result: BuildResult, *, explain: bool) -> None:
    """The closing table: per kernel's schemes, how many were built, rejected and failed, and the range of their
    resources.
    """
    table = Table(title=f"{request.gpu.name} ({request.gpu.arch}), {request.effort.value}", title_justify="left")
    for name, justify in (
        ("schemes", "left"),
        ("built", "right"),
        ("rejected", "right"),
        ("failed", "right"),
        ("registers", "right"),
        ("smem KiB", "right"),
    ):
        table.add_column(name, justify="left" if justify == "left" else "right")
    for row in _rows(request, result):
        table.add_row(
            row["schemes"],
            *(str(row[key]) for key in ("built", "rejected", "failed")),
            _range(row["registers"]),
            _range(row["smem_kib"]),
        )
    console = Console()
    console.print(table)
    bundle = result.bundle
    if explain:
        for item in bundle.refused:
            print(
                f"{_names(item.spec.schemes)} {item.spec.config.name}: {item.status.value}: {'; '.join(item.reasons)}"
            )
    elif bundle.refused:
        for kind in count_kinds(item.reasons for item in bundle.refused):
            print(f"{kind.count:8d}  {kind.example}")
    compiled = len(result.plan.specs) - result.num_cached
    print(
        f"{len(bundle.kernels)} kernels in {bundle.path} (fingerprint {bundle.fingerprint}): {compiled} compiled, "
        f"{result.num_cached} from the cache, {len(bundle.refused)} refused, {result.seconds:.1f} s"
    )


def summary(request: BuildRequest, result: BuildResult) -> dict[str, Any]:
    """The result as JSON values."""
    return {
        "gpu": request.gpu.name,
        "arch": request.gpu.arch,
        "effort": request.effort.value,
        "bundle": str(result.bundle.path),
        "fingerprint": result.bundle.fingerprint,
        "num_kernels": len(result.bundle.kernels),
        "num_cached": result.num_cached,
        "num_compiled": len(result.plan.specs) - result.num_cached,
        "num_rejected_by_rules": len(result.plan.rejected),
        "num_failed": len(result.failures),
        "seconds": round(result.seconds, 3),
        "schemes": _rows(request, result),
        "refused": [
            {
                "schemes": _names(item.spec.schemes),
                "config": item.spec.config.name,
                "status": item.status.value,
                "reasons": list(item.reasons),
            }
            for item in result.bundle.refused
        ],
    }


def _rows(request: BuildRequest, result: BuildResult) -> list[dict[str, Any]]:
    """One row per kernel's schemes."""
    rows = []
    for slots in request.slots:
        facts = [kernel.facts for kernel in result.bundle.kernels if kernel.spec.schemes == slots]
        refused = [item for item in result.bundle.refused if item.spec.schemes == slots]
        failed = sum(item in result.failures for item in refused)
        by_rules = sum(item.slots == slots for item in result.plan.rejected)
        rows.append(
            {
                "schemes": _names(slots),
                "built": len(facts),
                "rejected": by_rules + len(refused) - failed,
                "failed": failed,
                "registers": sorted({fact.registers_per_thread for fact in facts}),
                "smem_kib": sorted({round(fact.smem_bytes / 1024, 1) for fact in facts}),
            }
        )
    return rows


def _range(values: list[float]) -> str:
    return "" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}-{values[-1]:g}"


def _names(slots: tuple[QuantScheme, ...]) -> str:
    return "+".join(scheme.name for scheme in slots)
