"""The middle of a tuning run: finalists from the solver and from a study, and what their launches take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from allocator import latency
from allocator.allocate import Options, allocate
from allocator.allocation import Allocation, Granularity
from allocator.arrays import InfeasibleError
from allocator.extras import require_study
from allocator.latencies import Latencies
from allocator.report_text import best_uniform
from allocator.scenarios import by_share
from allocator.sensitivity import Sensitivity
from allocator.stages import Stages
from allocator.study.evaluate import Evaluator
from allocator.study.evidence import Evidence
from allocator.study.problem import of as problem_of
from allocator.tuning_plan import Plan
from costmodel.model_file import FittedModel
from costmodel.table import CostTable
from kernel_gen.sweeping.measuring import Bench
from profiles.atomic import replacing
from profiles.errors import DataError
from profiles.loads import TokenLoad
from profiles.models import MoeShape

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

MIXED, STUDY = "mixed", "study"
COARSER = {"one scheme an expert": Granularity.EXPERT, "one scheme a layer": Granularity.LAYER}
STUDY_LOSS_WEIGHT = 0.75
"""Of a study's product where finalists are ranked by loss alone: the paper's r."""


class Finalists:
    """Allocations to be verified. `loads`: by name, experts by falling share; `trace`: by layer; `fitted`: what prices
    launches, None: the analytic model.
    """

    def __init__(
        self,
        plan: Plan,
        shape: MoeShape,
        stages: Stages,
        files: Mapping[str, Path],
        loads: Mapping[str, TokenLoad],
        trace: Mapping[int, TokenLoad],
        fitted: FittedModel | None,
    ) -> None:
        self.plan, self.shape, self.stages, self.files = plan, shape, stages, files
        self.loads, self.trace, self.fitted = loads, trace, fitted
        self._inputs = [files["losses"], files["cost"]]

    def solve(self) -> None:
        """The mixed allocation, coarser ones, and the best uniform scheme within the budget."""
        file = self.files["finalists"]

        def make() -> None:
            sensitivity, cost = Sensitivity.read(self.files["losses"]), CostTable.read(self.files["cost"])

            def solved(options: Options) -> Allocation:
                return allocate(sensitivity, cost, self.plan.budget, shape=self.shape, options=options)

            found = {MIXED: solved(Options(granularity=self.plan.granularity))}
            for name, granularity in COARSER.items():
                try:
                    found[name] = solved(Options(granularity=granularity))
                except InfeasibleError as error:
                    self.stages.say(f"{name}: {error}")
            uniform = best_uniform(found[MIXED])
            if uniform is not None:
                options = Options(granularity=Granularity.LAYER, schemes=(uniform.scheme,))
                found[f"uniform {uniform.scheme.name}"] = solved(options)
            _write(file, found)

        settings = self._budget() | {"granularity": self.plan.granularity.value}
        self.stages.ensure("allocate", make, reads=self._inputs, settings=settings, writes=[file])

    def study(self) -> str | None:
        """A study's best allocation, kernels and bits chosen together; gives what is to be said where there is none.

        Its trials are in study.db: a killed stage goes on with them.
        """
        plan, file = self.plan, self.files["study"]
        if plan.study_trials == 0:
            return "no outer study: --study-trials 0"
        if plan.granularity is not Granularity.LINEAR:
            return f"no outer study: it gives each linear its scheme, --granularity asks for {plan.granularity.value}"
        require_study("the outer study (leave it out with --study-trials 0)")

        def make() -> None:
            from allocator.study.finalists import best_of_study
            from allocator.study.objective import Goal, Objective
            from allocator.study.run import Settings

            objective = Objective.LOSS if plan.budget.max_latency_us else Objective.PRODUCT
            weight = plan.loss_weight if plan.loss_weight < 1 else STUDY_LOSS_WEIGHT
            goal = Goal(objective=objective, loss_weight=weight)
            settings = Settings(goal=goal, num_trials=plan.study_trials, seed=plan.seed)
            storage = f"sqlite:///{(plan.out / 'study.db').absolute()}"
            found = best_of_study(self.evaluator, settings, storage, on_trial=_teller(self.stages.say))
            _write(file, {} if found is None else {STUDY: found})

        trace = {layer: load.tokens_per_expert for layer, load in self.trace.items()}
        settings = self._budget() | {
            "trials": plan.study_trials,
            "seed": plan.seed,
            "loss_weight": plan.loss_weight,
            "model": None if self.fitted is None else self.fitted.version,
            "trace": [[layer, list(tokens)] for layer, tokens in sorted(trace.items())],
        }
        self.stages.ensure("study", make, reads=self._inputs, settings=settings, writes=[file])
        return None if _read(file) else f"the study: none of its {plan.study_trials} trials holds every limit"

    @cached_property
    def evaluator(self) -> Evaluator:
        """Prices launches under the loads, every layer's experts in the order of its own trace."""
        sensitivity, cost = Sensitivity.read(self.files["losses"]), CostTable.read(self.files["cost"])
        evidence = Evidence.from_cost_table(cost, self.shape.name, self.shape.num_experts, self.loads)
        evidence = replace(evidence, latency_model=self.fitted)
        experts = {layer: by_share(load) for layer, load in self.trace.items()}
        return Evaluator.of(problem_of(sensitivity, self.shape, self.plan.budget, evidence, experts=experts))

    def all(self) -> dict[str, Allocation]:
        """By name."""
        held = [self.files["finalists"], *([self.files["study"]] if "study" in self.stages.done else [])]
        return {name: one for file in held for name, one in _read(file).items()}

    def latencies(self, bench: Bench | None) -> tuple[Latencies | None, str]:
        """What the finalists' launches took, and from where that is; or why there is none."""
        plan, file = self.plan, self.files["latencies"]
        if plan.latencies is not None:
            return self._given(plan.latencies)
        reason = None if bench is not None else latency.why_not(plan.gpu)
        if reason is not None:
            return None, f"latencies of finalists are predicted, not measured: {reason}"
        finalists = self.all()

        def make() -> None:
            asked = latency.Plan(shape=self.shape, gpu=plan.gpu, loads=self.loads, trace=self.trace)
            if bench is not None:
                found = latency.measure(finalists, asked, bench)
            else:
                with latency.open_bench(plan.gpu) as own:
                    found = latency.measure(finalists, asked, own)
            found.write(file)

        settings = {
            "gpu": plan.gpu.name,
            "finalists": {name: one.to_json() for name, one in finalists.items()},
            "loads": {name: list(load.tokens_per_expert) for name, load in self.loads.items()},
            "trace": [[layer, list(load.tokens_per_expert)] for layer, load in sorted(self.trace.items())],
        }
        self.stages.ensure("latency", make, settings=settings, writes=[file])
        found = Latencies.read(file)
        for failure in found.failures:
            self.stages.say(f"latency: failed: {failure}")
        return found, f"latencies of finalists were measured on {found.gpu}: {found.extent}"

    def _given(self, path: Path) -> tuple[Latencies, str]:
        found = Latencies.read(path)
        if (found.model, found.gpu) != (self.shape.name, self.plan.gpu.name):
            raise DataError(
                f"{path} is of {found.model} on {found.gpu}, this run of {self.shape.name} on {self.plan.gpu.name}"
            )
        missing = [name for name, one in self.all().items() if found.of(one) is None]
        note = f"latencies of finalists were measured on {found.gpu} ({path.name}): {found.extent}"
        return found, note + (f"; not those of {', '.join(missing)}" if missing else "")

    def _budget(self) -> dict[str, object]:
        budget = self.plan.budget
        return {
            "bits": budget.avg_weight_bits,
            "bytes": budget.weight_bytes,
            "latency": dict(budget.max_latency_us),
            "per_layer": budget.per_layer,
        }


def _teller(say: Callable[[str], None]) -> Callable[[FrozenTrial], None]:
    """Says a line for every tenth trial."""

    def tell(trial: FrozenTrial) -> None:
        if (trial.number + 1) % 10 == 0:
            say(f"study: {trial.number + 1} trials")

    return tell


def _write(file: Path, allocations: Mapping[str, Allocation]) -> None:
    with replacing(file) as temporary:
        content = {name: allocation.to_json() for name, allocation in allocations.items()}
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Allocation]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return {name: Allocation.from_json(one, where=name) for name, one in content.items()}
