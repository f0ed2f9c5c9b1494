"""The stages of `allocator.tune`, each cached: trace, calibrate, cost, allocate, study, verify, latency, report."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.allocate import Options
from allocator.allocation import Allocation
from allocator.calibrate import DEFAULT_MEASURE
from allocator.report import write_report
from allocator.report_data import collect
from allocator.scenarios import learned_table, predicted_table, profiled_table
from allocator.sensitivity import Sensitivity
from allocator.stages import Stages, checkpoint_digest, file_digest
from allocator.tuning_finalists import Finalists
from allocator.tuning_plan import Plan, Tuned
from allocator.verify import Verification, verify
from costmodel import shipped
from costmodel.model_file import FittedModel
from costmodel.table import CostTable
from kernel_gen.sweeping.measuring import Bench
from profiles.loads import TokenLoad, read_trace, write_trace
from profiles.models import MoeShape, model_from_config
from profiles.places import committed_profiles
from profiles.store import ProfileStore

if TYPE_CHECKING:
    from allocator.calibration.data import Sequences
    from allocator.calibration.model import StreamedModel
    from allocator.calibration.quantizer import Quantizer


class Tuning:
    """One run. Files in `plan.out`: trace.json, losses.parquet, cost.parquet, finalists.json, study.json (its trials
    are in study.db), divergence.json, latencies.json, verification.json, allocation.json, report.html.

    `bench`: measure launches there, whatever GPUs this machine has.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None], bench: Bench | None = None) -> None:
        self.plan, self.say, self.bench = plan, say, bench
        self.stages = Stages(folder=plan.out, say=say)
        self.shape: MoeShape = model_from_config(plan.model)
        self.files = {
            name: plan.out / f"{name}.{kind}"
            for name, kind in (
                ("trace", "json"), ("losses", "parquet"), ("cost", "parquet"), ("finalists", "json"),
                ("study", "json"), ("divergence", "json"), ("latencies", "json"), ("verification", "json"),
                ("allocation", "json"), ("report", "html"),
            )
        }  # fmt: skip
        self._checkpoint = checkpoint_digest(plan.model)
        self._model: StreamedModel | None = None

    def run(self) -> Tuned:
        """Every stage that is not done yet. UserErrors of each stage pass through."""
        self.trace()
        self.calibrate()
        notes = [*self.price()]
        self.finalists.solve()
        remark = self.finalists.study()
        if remark is not None:
            notes.append(remark)
        self.verify()
        chosen, remark = self.choose()
        notes.append(remark)
        cost = CostTable.read(self.files["cost"])
        sources = sorted(set(cost.frame()["source"].astype(str)))
        return Tuned(
            allocation=Allocation.read(self.files["allocation"]),
            chosen=chosen,
            verification=Verification.read(self.files["verification"]),
            cost_source=" and ".join(sources),
            notes=tuple(notes),
            stages=self.stages.done,
            files=self.files,
        )

    @property
    def model(self) -> StreamedModel:
        """Opened when first needed: a run whose stages are all found reads no weights."""
        if self._model is None:
            from allocator.calibration.model import StreamedModel

            self._model = StreamedModel(self.plan.model, device=self.plan.device)
        return self._model

    def _sequences(self, file: Path) -> Sequences:
        from allocator.calibration.data import read_sequences

        return read_sequences(
            file,
            self.plan.model,
            vocab_size=self.model.vocab_size,
            length=self.plan.length,
            number=self.plan.num_sequences,
            seed=self.plan.seed,
        )

    @property
    def quantizer(self) -> Quantizer:
        """GPTQ with clipping, what calibration and verification round with."""
        from allocator.calibration.quantizer import Method, Quantizer

        return Quantizer(method=Method.GPTQ, clip=True, rotate=self.plan.rotate)

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "checkpoint": self._checkpoint,
            "num_sequences": plan.num_sequences,
            "length": plan.length,
            "seed": plan.seed,
        }

    def trace(self) -> None:
        """How many tokens each expert gets."""
        file = self.files["trace"]

        def make() -> None:
            from allocator.calibration.routing import trace

            routing = trace(self.model, self._sequences(self.plan.data), batch_size=self.plan.batch_size)
            write_trace(routing.loads(), file)

        self.stages.ensure("trace", make, reads=[self.plan.data], settings=self._settings(), writes=[file])

    def calibrate(self) -> None:
        """What every scheme costs every linear; layers that a killed run had done are not done again."""
        file, plan = self.files["losses"], self.plan

        def make() -> None:
            from allocator.calibration.layer_losses import LossOptions
            from allocator.calibration.measures import measure_of
            from allocator.calibration.partial import Partial, fingerprint
            from allocator.calibration.sensitivities import calibrate

            measure, sequences = measure_of(DEFAULT_MEASURE), self._sequences(plan.data)
            options = LossOptions(schemes=plan.schemes, quantizer=self.quantizer, max_rows=plan.max_rows)
            mark = fingerprint(self.model, sequences.tokens, [measure.name], options, plan.seed)
            partial = Partial(file, mark)
            found = calibrate(
                self.model,
                sequences,
                [measure],
                options,
                batch_size=plan.batch_size,
                seed=plan.seed,
                partial=partial,
                progress=self.say,
            )
            found.sensitivities[measure.name].write(file)
            partial.remove()

        settings = self._settings() | {
            "schemes": [scheme.name for scheme in plan.schemes],
            "max_rows": plan.max_rows,
            "rotate": plan.rotate,
        }
        self.stages.ensure("calibrate", make, reads=[plan.data], settings=settings, writes=[file])

    def typical_loads(self) -> dict[str, TokenLoad]:
        """The named loads, routed as the trace is."""
        trace = read_trace(self.files["trace"])
        return {name: batch.load(trace, self.shape, name) for name, batch in self.plan.loads.items()}

    @cached_property
    def fitted(self) -> FittedModel | None:
        """Of the GPU's launches that come with the package; None: there are none, the analytic model predicts."""
        gpu = self.plan.gpu
        return shipped.fitted(gpu) if committed_profiles(gpu.name) else None

    def price(self) -> tuple[str, ...]:
        """The cost table, from the profile where one was given, else predicted. Gives what is to be said about it."""
        plan, file = self.plan, self.files["cost"]
        loads = self.typical_loads()
        model = "analytic" if self.fitted is None else f"fitted on {plan.gpu.name}'s launches that come with bitile"
        notes: tuple[str, ...] = (
            f"latencies are predicted, not measured: no --profile was given; the model is {model}",
        )
        profile = None
        if plan.profile is not None:
            profile = ProfileStore(plan.profile).records()
            table, notes = profiled_table(profile, plan.gpu, self.shape, loads)

        def make() -> None:
            if profile is not None:
                table.write(file)
            elif self.fitted is not None:
                learned_table(self.fitted, self.shape, loads, plan.schemes).write(file)
            else:
                predicted_table(plan.gpu, self.shape, loads, plan.schemes).write(file)

        settings = {
            "gpu": plan.gpu.name,
            "shape": repr(self.shape),
            "loads": {name: load.tokens_per_expert for name, load in loads.items()},
            "schemes": [scheme.name for scheme in plan.schemes],
            "profile": None if plan.profile is None else file_digest(plan.profile),
            "model": None if self.fitted is None else self.fitted.version,
        }
        self.stages.ensure("cost", make, settings=settings, writes=[file])
        return notes

    @cached_property
    def finalists(self) -> Finalists:
        """What is verified; the trace is there by then."""
        trace = read_trace(self.files["trace"])
        return Finalists(self.plan, self.shape, self.stages, self.files, self.typical_loads(), trace, self.fitted)

    def verify(self) -> None:
        """Every finalist's divergence measured on held-out tokens."""
        file, plan = self.files["divergence"], self.plan
        finalists = self.finalists.all()

        def make() -> None:
            held_out, calibration = self._sequences(plan.held_out), self._sequences(plan.data)
            verify(
                self.model,
                held_out,
                calibration,
                finalists,
                self.quantizer,
                batch_size=plan.batch_size,
                progress=self.say,
            ).write(file)

        settings = self._settings() | {
            "quantizer": self.quantizer.name,
            "finalists": {name: allocation.to_json() for name, allocation in finalists.items()},
        }
        self.stages.ensure("verify", make, reads=[plan.data, plan.held_out], settings=settings, writes=[file])

    def choose(self) -> tuple[str, str]:
        """The finalists ranked by what was measured; the first becomes the allocation, and has its report. Gives its
        name, and where latencies are from.
        """
        plan, allocations = self.plan, self.finalists.all()
        latencies, note = self.finalists.latencies(self.bench)

        def make() -> None:
            prices = {
                name: self.finalists.evaluator.best_launches_us(one.assignment) for name, one in allocations.items()
            }
            verification = (
                Verification.read(self.files["divergence"])
                .with_latencies(allocations, {n: us for n, us in prices.items() if us}, latencies, note)
                .ranked(plan.budget.max_latency_us, plan.loss_weight)
            )
            verification.write(self.files["verification"])
            allocation = allocations[verification.finalists[0].name]
            allocation.write(self.files["allocation"])
            data = collect(
                allocation,
                self.shape,
                sensitivity=Sensitivity.read(self.files["losses"]),
                cost_table=CostTable.read(self.files["cost"]),
                options=Options(granularity=plan.granularity),
                verification=verification,
            )
            write_report(data, self.shape, self.files["report"])

        reads = [self.files[name] for name in ("losses", "cost", "divergence")]
        settings = {
            "limits": dict(plan.budget.max_latency_us),
            "loss_weight": plan.loss_weight,
            "latencies": None if latencies is None else latencies.to_json(),
            "note": note,
        }
        writes = [self.files[name] for name in ("verification", "allocation", "report")]
        self.stages.ensure("report", make, reads=reads, settings=settings, writes=writes)
        return Verification.read(self.files["verification"]).finalists[0].name, note
