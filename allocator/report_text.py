"""A report in words: its headline and its figures at a glance."""

from __future__ import annotations

from allocator.allocation import Allocation, Uniform
from allocator.report_data import ReportData


def best_uniform(allocation: Allocation) -> Uniform | None:
    """The uniform scheme of least loss within the budget."""
    within = [uniform for uniform in allocation.uniform if uniform.within_budget]
    return min(within, key=lambda uniform: uniform.loss, default=None)


def headline(data: ReportData) -> str:
    """The allocation beside the best uniform scheme, in one sentence."""
    allocation = data.allocation
    best = best_uniform(allocation)
    if best is None:
        return f"{len(allocation.assignment)} linears; no uniform scheme holds the budget, this allocation does."
    if best.loss > 0:
        change = 1 - allocation.predicted_loss / best.loss
        versus = f"{change:.1%} less predicted loss than {best.scheme.name}, the best uniform scheme in the budget"
    else:
        versus = f"{best.scheme.name} holds the budget without loss"
    return f"{len(allocation.assignment)} linears; {versus}."


def tiles(data: ReportData) -> list[tuple[str, str]]:
    """(figure, what it is)."""
    allocation = data.allocation
    shown = [
        (f"{allocation.avg_weight_bits:.3f}", "stored bits per weight"),
        (f"{allocation.weight_bytes / 1e6:,.1f} MB", "expert weights"),
        (f"{allocation.predicted_loss:.4g}", "predicted loss"),
        (f"{100 * allocation.gap:.2g}%", "at most above the optimum"),
    ]
    shown += [(f"{us:,.0f} us", name.partition(", seed")[0]) for name, us in allocation.predicted_latency_us.items()]
    return shown
