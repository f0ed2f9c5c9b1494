"""`--worth`: what tuning a sweep's cells would gain and take, before anything is measured. Needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from costmodel.guide import Guide
from costmodel.worth import Effort, Gain, core_picks, gain_over, rehearse
from kernel_gen.sweeping.choices import Choices
from kernel_gen.sweeping.guided import Guidance
from kernel_gen.sweeping.plan import Cell, SweepRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What is expected. `over_default`: over the analytic model's picks; `over_model`: over the fitted model's, which
    are what the library launches untuned on a GPU whose launches come with it; None without one.
    """

    base_name: str
    num_launches: int
    num_candidates: int
    goal: float
    over_default: Gain
    over_model: Gain | None
    guided: Effort
    exhaustive: Effort

    def __str__(self) -> str:
        lines = [
            f"{self.num_launches} launches, {self.num_candidates} candidates, by {self.base_name}:",
            f"  expected gain over the analytic model's picks: {_percent(self.over_default)}, mean over launches",
        ]
        if self.over_model is not None:
            lines.append(f"  expected gain over the fitted model's picks: {_percent(self.over_model)}")
        lines.append(f"  guided, to an expected regret of {100 * self.goal:g}%: about {_minutes(self.guided)}")
        lines.append(f"  every candidate: {_minutes(self.exhaustive)}")
        return "\n".join(lines)

    def summary(self) -> dict[str, object]:
        """For JSON: fractions and seconds."""
        return asdict(self)


def worth(request: SweepRequest, cells: Sequence[Cell], guidance: Guidance) -> Worth:
    """Of tuning these cells with this guidance, from nothing measured."""
    choices = Choices.of(request, cells, guidance.base)
    guide = Guide.of(choices.candidates, guidance.base, batch=guidance.batch)
    none, unknown = np.zeros(len(choices), dtype=np.bool_), np.full(len(choices), np.nan)
    belief = guide.believe(none, unknown)
    every = np.arange(len(choices), dtype=np.intp)
    return Worth(
        base_name=guidance.base_name,
        num_launches=len(cells),
        num_candidates=len(choices),
        goal=guidance.goal,
        over_default=gain_over(guide, belief, core_picks(guide)),
        over_model=None if guidance.base is None else gain_over(guide, belief, belief.chosen),
        guided=rehearse(guide, goal=guidance.goal, max_measurements=guidance.max_measurements or len(choices)),
        exhaustive=Effort(num_measurements=len(every), seconds=guide.costs.of(guide.candidates, every, none)),
    )


def _percent(gain: Gain) -> str:
    return f"{100 * gain.expected:.1f}% ({100 * gain.confidence:g}%: {100 * gain.low:.1f}% to {100 * gain.high:.1f}%)"


def _minutes(effort: Effort) -> str:
    return f"{effort.num_measurements} measurements, {effort.seconds / 60:.1f} minutes of GPU and compiler"
