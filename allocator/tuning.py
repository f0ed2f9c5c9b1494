"""The stages of `python -m allocator.tune`: trace, calibrate, cost table, allocate, verify, report. Each is cached."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.allocate import Options, allocate
from allocator.allocation import Allocation, Granularity
from allocator.arrays import InfeasibleError
from allocator.budget import Budget
from allocator.calibrate import DEFAULT_MEASURE
from allocator.report import write_report
from allocator.report_data import collect
from allocator.report_text import best_uniform
from allocator.scenarios import predicted_table, profiled_table, typical_load
from allocator.sensitivity import Sensitivity
from allocator.stages import Stages, checkpoint_digest, file_digest
from allocator.verify import Verification, verify
from costmodel.table import CostTable
from profiles.atomic import replacing
from profiles.gpus import GpuSpec
from profiles.loads import TokenLoad, read_trace, write_trace
from profiles.models import MoeShape, model_from_config
from profiles.schemes import QuantScheme
from profiles.store import ProfileStore

if TYPE_CHECKING:
    from allocator.calibration.data import Sequences
    from allocator.calibration.model import StreamedModel
    from allocator.calibration.quantizer import Quantizer

MIXED = "mixed"
COARSER = {"one scheme an expert": Granularity.EXPERT, "one scheme a layer": Granularity.LAYER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a tuning run is asked for.

    Attributes:
        model: a checkpoint folder.
        data, held_out: texts or ids to calibrate and to measure on.
        gpu: whose latencies count.
        budget: the limits.
        loads: tokens of a batch by name.
        schemes: what is calibrated and may be chosen.
        out: the folder of all results.
        profile: measured launches; None: latencies are predicted.
        granularity: what gets one scheme.
        num_sequences, length, batch_size, seed, max_rows, rotate, device: of calibration and verification.
    """

    model: Path
    data: Path
    held_out: Path
    gpu: GpuSpec
    budget: Budget
    loads: Mapping[str, int]
    schemes: tuple[QuantScheme, ...]
    out: Path
    profile: Path | None = None
    granularity: Granularity = Granularity.LINEAR
    num_sequences: int = 128
    length: int = 2048
    batch_size: int = 1
    seed: int = 0
    max_rows: int = 2048
    rotate: bool = False
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What came out. chosen: the finalist of least measured divergence; stages: which were made or found, in order."""

    allocation: Allocation
    chosen: str
    verification: Verification
    cost_source: str
    notes: tuple[str, ...]
    stages: Mapping[str, str]
    files: Mapping[str, Path] = field(default_factory=dict)


class Tuning:
    """One run. Files in `plan.out`: trace.json, losses.parquet, cost.parquet, finalists.json, verification.json,
    allocation.json, report.html.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan, self.say = plan, say
        self.stages = Stages(folder=plan.out, say=say)
        self.shape: MoeShape = model_from_config(plan.model)
        self.files = {
            name: plan.out / f"{name}.{kind}"
            for name, kind in (
                ("trace", "json"), ("losses", "parquet"), ("cost", "parquet"), ("finalists", "json"),
                ("verification", "json"), ("allocation", "json"), ("report", "html"),
            )
        }  # fmt: skip
        self._checkpoint = checkpoint_digest(plan.model)
        self._model: StreamedModel | None = None

    def run(self) -> Tuned:
        """Every stage that is not done yet. UserErrors of each stage pass through."""
        self.trace()
        self.calibrate()
        notes = self.price()
        self.solve()
        self.verify()
        chosen = self.choose()
        cost = CostTable.read(self.files["cost"])
        sources = sorted(set(cost.frame()["source"].astype(str)))
        return Tuned(
            allocation=Allocation.read(self.files["allocation"]),
            chosen=chosen,
            verification=Verification.read(self.files["verification"]),
            cost_source=" and ".join(sources),
            notes=notes,
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
        return {name: typical_load(trace, self.shape, tokens, name) for name, tokens in self.plan.loads.items()}

    def price(self) -> tuple[str, ...]:
        """The cost table, from the profile where one was given, else predicted. Gives what is to be said about it."""
        plan, file = self.plan, self.files["cost"]
        loads = self.typical_loads()
        notes: tuple[str, ...] = ("latencies are predicted, not measured: no --profile was given",)
        profile = None
        if plan.profile is not None:
            profile = ProfileStore(plan.profile).records()
            table, notes = profiled_table(profile, plan.gpu, self.shape, loads)

        def make() -> None:
            made = predicted_table(plan.gpu, self.shape, loads, plan.schemes) if profile is None else table
            made.write(file)

        settings = {
            "gpu": plan.gpu.name,
            "shape": repr(self.shape),
            "loads": {name: load.tokens_per_expert for name, load in loads.items()},
            "schemes": [scheme.name for scheme in plan.schemes],
            "profile": None if plan.profile is None else file_digest(plan.profile),
        }
        self.stages.ensure("cost", make, settings=settings, writes=[file])
        return notes

    def solve(self) -> None:
        """The finalists: the mixed allocation, coarser ones, and the best uniform scheme within the budget."""
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
                    self.say(f"{name}: {error}")
            uniform = best_uniform(found[MIXED])
            if uniform is not None:
                options = Options(granularity=Granularity.LAYER, schemes=(uniform.scheme,))
                found[f"uniform {uniform.scheme.name}"] = solved(options)
            content = {name: allocation.to_json() for name, allocation in found.items()}
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

        budget = self.plan.budget
        settings = {
            "bits": budget.avg_weight_bits,
            "bytes": budget.weight_bytes,
            "latency": dict(budget.max_latency_us),
            "per_layer": budget.per_layer,
            "granularity": self.plan.granularity.value,
        }
        reads = [self.files["losses"], self.files["cost"]]
        self.stages.ensure("allocate", make, reads=reads, settings=settings, writes=[file])

    def finalists(self) -> dict[str, Allocation]:
        """By name."""
        content = json.loads(self.files["finalists"].read_text(encoding="utf-8"))
        return {name: Allocation.from_json(one, where=name) for name, one in content.items()}

    def verify(self) -> None:
        """Every finalist measured on held-out tokens."""
        file, plan = self.files["verification"], self.plan

        def make() -> None:
            held_out, calibration = self._sequences(plan.held_out), self._sequences(plan.data)
            verify(
                self.model,
                held_out,
                calibration,
                self.finalists(),
                self.quantizer,
                batch_size=plan.batch_size,
                progress=self.say,
            ).write(file)

        settings = self._settings() | {"quantizer": self.quantizer.name}
        reads = [plan.data, plan.held_out, self.files["finalists"]]
        self.stages.ensure("verify", make, reads=reads, settings=settings, writes=[file])

    def choose(self) -> str:
        """The finalist of least measured divergence becomes the allocation, and has its report."""
        verification = Verification.read(self.files["verification"])
        chosen = verification.finalists[0].name

        def make() -> None:
            allocation = self.finalists()[chosen]
            allocation.write(self.files["allocation"])
            data = collect(
                allocation,
                self.shape,
                sensitivity=Sensitivity.read(self.files["losses"]),
                cost_table=CostTable.read(self.files["cost"]),
                options=Options(granularity=self.plan.granularity),
                verification=verification,
            )
            write_report(data, self.shape, self.files["report"])

        reads = [self.files[name] for name in ("losses", "cost", "finalists", "verification")]
        writes = [self.files["allocation"], self.files["report"]]
        self.stages.ensure("report", make, reads=reads, settings={"chosen": chosen}, writes=writes)
        return chosen
