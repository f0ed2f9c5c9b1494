"""The options of `--guided`, and the model that a guided sweep begins from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from profiles.errors import DataError, SpecError
from profiles.gpus import GpuSpec
from profiles.places import committed_profiles

if TYPE_CHECKING:
    from kernel_gen.sweeping.guided import Guidance

NO_MODEL = "none"
_MAX_BATCH = 1024
_NEEDS_GUIDED = ("latency_model", "goal", "max_measurements", "max_seconds", "batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedOptions:
    """What the command line says; `guidance` makes it ready, which may take the seconds of fitting a model.

    `only_worth`: nothing is to be measured.
    """

    latency_model: Path | None
    without_model: bool
    goal: float
    max_measurements: int | None
    max_seconds: float | None
    batch: int
    only_worth: bool

    def guidance(self, gpu: GpuSpec, say: Callable[[str], None]) -> Guidance:
        """DataError for a model that is refused or of another GPU."""
        # What learns needs scipy and scikit-learn, a second to import that other sweeps are spared.
        from costmodel import model_file, shipped
        from kernel_gen.sweeping.guided import Guidance

        base, name = None, "the analytic core"
        if self.latency_model is not None:
            base, name = model_file.read(self.latency_model), str(self.latency_model)
        elif not self.without_model and committed_profiles(gpu.name):
            say(f"the latency model of the launches of {gpu.name} that come with bitile; fitted now if it never was")
            base = shipped.fitted(gpu)
            name = f"a model of {base.num_rows} launches"
        if base is not None and base.gpu != gpu.name:
            raise DataError(f"{name} was fitted on {base.gpu}, not {gpu.name}: fit one, or pass --latency-model none")
        return Guidance(
            base=None if base is None else base.model,
            base_name=name if base is None else base.version,
            goal=self.goal,
            max_measurements=self.max_measurements,
            max_seconds=self.max_seconds,
            batch=self.batch,
        )


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    guided = parser.add_argument_group("guided measuring")
    guided.add_argument(
        "--guided",
        action="store_true",
        help="a latency model chooses what to measure next, until little would be gained by going on",
    )
    guided.add_argument(
        "--worth",
        action="store_true",
        help="measure nothing: say what guided measuring is expected to gain, and how long it takes",
    )
    guided.add_argument(
        "--latency-model",
        metavar="FILE",
        help="made by python -m costmodel.fit, to begin from; none: the analytic core"
        " (default: one fitted on the GPU's profiles that come with bitile, if there are any)",
    )
    guided.add_argument(
        "--goal",
        type=float,
        metavar="SHARE",
        help="stop when the choices are expected to be this much slower than the best, on average (default: 0.01)",
    )
    guided.add_argument("--max-measurements", type=int, metavar="N", help="stop after so many, failures counted")
    guided.add_argument("--max-seconds", type=float, metavar="S", help="stop after so long compiling and measuring")
    guided.add_argument("--batch", type=int, metavar="N", help="measurements between two decisions (default: 32)")


def parse(given: argparse.Namespace) -> GuidedOptions | None:
    """None without --guided or --worth. SpecError for what cannot be."""
    if not (given.guided or given.worth):
        for name in _NEEDS_GUIDED:
            if getattr(given, name) is not None:
                raise SpecError(f"--{name.replace('_', '-')} is an option of --guided, which is not given")
        return None
    if given.ray is not None:
        raise SpecError("--guided measures on this machine: leave out --ray")
    if given.backend == "predict" and not given.worth:
        raise SpecError("--guided measures: leave out --backend predict")
    goal = 0.01 if given.goal is None else given.goal
    batch = 32 if given.batch is None else given.batch
    if not 0 <= goal < 1:
        raise SpecError(f"--goal {goal:g}: a share of the best latency from 0 up to 1, such as 0.01")
    if not 1 <= batch <= _MAX_BATCH:
        raise SpecError(f"--batch {batch}: from 1 to {_MAX_BATCH} measurements")
    for name in ("max_measurements", "max_seconds"):
        limit = getattr(given, name)
        if limit is not None and not 0 < limit < 1e9:
            raise SpecError(f"--{name.replace('_', '-')} {limit:g}: it must be more than 0")
    return GuidedOptions(
        latency_model=None if given.latency_model in (None, NO_MODEL) else Path(given.latency_model),
        without_model=given.latency_model == NO_MODEL,
        goal=goal,
        max_measurements=given.max_measurements,
        max_seconds=given.max_seconds,
        batch=batch,
        only_worth=given.worth,
    )
