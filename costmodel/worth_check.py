"""How honest "is it worth tuning?" is: gains predicted before measuring, against those that exhaustive measuring
found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel import features
from costmodel.fit import MIN_ROWS
from costmodel.groups import HeldOut, group_labels, launch_ids
from costmodel.guide import Guide, best_rows
from costmodel.model import LatencyModel
from costmodel.recorded import candidates_of, with_choice
from costmodel.worth import core_picks, gain_over

MIN_LAUNCHES = 6
"""A question of so many launches is asked: of one model and one scheme (or mix)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorthCheck:
    """Of `num_questions`, each "what would tuning this scheme of this model gain?": the mean gain predicted and
    realised, the share of intervals (of probability `confidence`) that hold the realised gain, and the correlation of
    both.
    """

    default: str
    num_questions: int
    predicted: float
    realised: float
    confidence: float
    covered: float
    correlation: float | None


def check(rows: pd.DataFrame, *, seed: int = 0) -> list[WorthCheck]:
    """Over a profile's finished rows; a model's questions are answered from the other models' rows. Gains over the
    analytic core's picks, and over the fitted model's; empty where there is only one model, or no question.
    """
    rows = with_choice(rows)
    X, y = features.of_profile(rows), rows["latency_us"].to_numpy(dtype=np.float64)
    models = group_labels(rows, HeldOut.MODEL)
    used = rows["schemes"].map(lambda names: "+".join(sorted(set(names)))).to_numpy()
    answers: dict[str, list[tuple[float, float, float, float, float]]] = {}
    for model in pd.unique(models):
        own = models == model
        if (~own).sum() < MIN_ROWS:
            continue
        base = LatencyModel(num_folds=2, random_state=seed).fit(X[~own], y[~own])
        for scheme in pd.unique(used[own]):
            some = np.flatnonzero(own & (used == scheme))
            part = rows.iloc[some].reset_index(drop=True)
            launches = launch_ids(part)
            if MIN_LAUNCHES <= len(np.unique(launches)) < len(part):
                guide = Guide.of(candidates_of(part, X.iloc[some].reset_index(drop=True)), base)
                for default, answer in _answers(guide, y[some]).items():
                    answers.setdefault(default, []).append(answer)
    return [_summary(default, np.asarray(found)) for default, found in answers.items()]


def _answers(guide: Guide, y: npt.NDArray[np.float64]) -> dict[str, tuple[float, float, float, float, float]]:
    """(predicted, low, high, confidence, realised) of each kind of default."""
    belief = guide.believe(np.zeros(len(y), dtype=np.bool_), np.full(len(y), np.nan))
    best = y[best_rows(y, guide.candidates.launches)]
    found = {}
    for name, default in (("the analytic model's pick", core_picks(guide)), ("the fitted model's pick", belief.chosen)):
        gain = gain_over(guide, belief, default)
        realised = float((1.0 - best / y[default]).mean())
        found[name] = (gain.expected, gain.low, gain.high, gain.confidence, realised)
    return found


def _summary(default: str, answers: npt.NDArray[np.float64]) -> WorthCheck:
    predicted, low, high, confidence, realised = answers.T
    return WorthCheck(
        default=default,
        num_questions=len(answers),
        predicted=float(predicted.mean()),
        realised=float(realised.mean()),
        confidence=float(confidence[0]),
        covered=float(((low <= realised) & (realised <= high)).mean()),
        correlation=float(np.corrcoef(predicted, realised)[0, 1]) if predicted.std() * realised.std() > 0 else None,
    )


def markdown(checks: list[WorthCheck]) -> str:
    """A table."""
    lines = [
        "| gain over | questions | predicted, mean | realised, mean | 90% interval holds it | correlation |",
        "|---" * 6 + "|",
    ]
    for each in checks:
        correlation = "-" if each.correlation is None else f"{each.correlation:.2f}"
        lines.append(
            f"| {each.default} | {each.num_questions} | {100 * each.predicted:.1f}% | {100 * each.realised:.1f}%"
            f" | {100 * each.covered:.0f}% | {correlation} |"
        )
    return "\n".join(lines)
