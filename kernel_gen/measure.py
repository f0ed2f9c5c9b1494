"""One candidate on a GPU: inputs, values checked against the fp32 reference, then its time. Runs in a worker process
(kernel_gen.sweeping.isolation).

Inputs are random: weights normal / sqrt(K), quantised by kernel_gen.formats, every expert its own; activations normal.
They are made once per workload (weights) and load (activations, reference) and serve all of its configurations. The GPU
holds one packed stack of the experts; quantising goes a few experts at a time, and the reference dequantises one expert
at a time, so that nothing unpacked of the whole stack exists. A workload that does not fit is a failure of its
candidates ("out of memory"), not of the sweep.

Weights come from DRAM: each launch in the timed graph reads other entries of the stack for its active experts, and
where a stack is too small for that, further copies of it are made (`Rotation`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tvm_ffi
from torch import Tensor

from kernel_gen.experts import Experts
from kernel_gen.formats import Expected, PackedWeights, check_output, expected_output, pack, quantize, unpack
from kernel_gen.runtime import Activations, Kernel, prepare_activations
from kernel_gen.sweeping.candidates import Candidate, Measurement, Workload
from kernel_gen.sweeping.shelf import Shelf
from kernel_gen.timing import GpuClock, SampleRule
from profiles.errors import SpecError
from profiles.loads import TokenLoad
from profiles.records import Status
from profiles.schemes import QuantScheme

GUARD_ELEMENTS = 32768
"""bf16 elements before and after Y, 64 KiB each: more than the largest tile row block past either end that a wrong
index reaches at first.
"""
CANARY = 0x5AA5
"""What the guard bands hold, as int16: no value that a kernel would write everywhere."""
CHUNK_BYTES = 1 << 29
"""Float weights in memory while a stack is quantised."""
COLD_L2_FACTOR = 2.0
"""Bytes that other launches read before an entry is read again, over the size of L2."""

Launch = Callable[[], None]


class LaunchError(RuntimeError):
    """CUDA refused a launch, or found an earlier error when it was asked to: what a bundle's kernels raise."""


tvm_ffi.register_error("CUDADialectError", LaunchError)


@dataclass(frozen=True, slots=True, eq=False)
class GuardedOutput:
    """Y [T, N] bf16 between two bands of canaries."""

    y: Tensor
    whole: Tensor

    @classmethod
    def make(cls, rows: int, columns: int, device: torch.device | str) -> GuardedOutput:
        """Fresh and poisoned."""
        size = rows * columns
        whole = torch.full((size + 2 * GUARD_ELEMENTS,), CANARY, dtype=torch.int16, device=device)
        guarded = cls(whole[GUARD_ELEMENTS : GUARD_ELEMENTS + size].view(torch.bfloat16).view(rows, columns), whole)
        guarded.poison()
        return guarded

    def poison(self) -> None:
        """Fill Y with NaN, so that what a kernel does not write is not taken for a result."""
        self.y.fill_(torch.nan)

    def damage(self) -> str | None:
        """None while both bands are whole, else how many canaries are gone on either side."""
        before = int((self.whole[:GUARD_ELEMENTS] != CANARY).sum())
        after = int((self.whole[-GUARD_ELEMENTS:] != CANARY).sum())
        if before == after == 0:
            return None
        return f"it wrote out of bounds: {before} elements before Y and {after} after it"


def verify(launch: Launch, output: GuardedOutput, expected: Expected, synchronize: Launch) -> str | None:
    """Run `launch`, which writes `output.y`, twice. None if both gave the expected values, in the same bits, within
    bounds; else a sentence.
    """
    output.poison()
    launch()
    synchronize()
    problem = output.damage() or check_output(output.y, expected)
    if problem:
        return problem
    first = output.y.view(torch.int16).clone()
    output.poison()
    launch()
    synchronize()
    differing = int((output.y.view(torch.int16) != first).sum())
    return output.damage() or (f"a second run gave {differing} other values" if differing else None)


def make_stack(
    scheme: QuantScheme, num_experts: int, n: int, k: int, seed: int, device: torch.device | str
) -> PackedWeights:
    """Random experts [num_experts, n, k] in `scheme`, packed; only CHUNK_BYTES of floats exist at a time."""
    generator = torch.Generator(device=device).manual_seed(seed)
    step = max(1, CHUNK_BYTES // (4 * n * k))
    stack: PackedWeights | None = None
    for start in range(0, num_experts, step):
        count = min(step, num_experts - start)
        floats = torch.randn(count, n, k, generator=generator, device=device) / math.sqrt(k)
        chunk = pack(quantize(floats, scheme))
        del floats
        if stack is None:
            stack = _map_parts(chunk, num_experts, lambda part: part.new_empty((num_experts, *part.shape[1:])))
        for whole, part in zip(_parts(stack), _parts(chunk), strict=True):
            whole[start : start + count] = part
    assert stack is not None
    return stack


def reference(
    x: Tensor, stacks: Sequence[PackedWeights], members: Sequence[Sequence[int]], load: TokenLoad
) -> Expected:
    """What a launch should give for tokens `x` [T, K] sorted by expert, expert by expert, so that one expert's floats
    exist at a time.
    """
    y = torch.zeros(x.shape[0], stacks[0].n, dtype=torch.float32, device=x.device)
    tolerance = torch.zeros_like(y)
    place = {
        expert: (stack, entry)
        for stack, experts in zip(stacks, members, strict=True)
        for entry, expert in enumerate(experts)
    }
    plan = torch.zeros(1, 4, dtype=torch.int32)
    start = 0
    for expert, count in enumerate(load.tokens_per_expert):
        if count:
            stack, entry = place[expert]
            one = unpack(_map_parts(stack, 1, lambda part, entry=entry: part[entry : entry + 1]))  # type: ignore[misc]  # mypy: no lambda defaults
            rows = slice(start, start + count)
            found = expected_output(x[rows], [one], plan, torch.tensor([0, count], dtype=torch.int32))
            y[rows], tolerance[rows] = found.y, found.tolerance
        start += count
    return Expected(y=y, tolerance=tolerance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """How a timed graph keeps L2 cold: its `launches` read each stack's entries in turn, `turns` times disjoint ones,
    then those of the next of `copies` copies. One number a stack.
    """

    launches: int
    turns: tuple[int, ...]
    copies: tuple[int, ...]

    @classmethod
    def of(
        cls, members: Sequence[Sequence[int]], entry_bytes: Sequence[int], load: TokenLoad, l2_bytes: int
    ) -> Rotation:
        """The fewest of each so that COLD_L2_FACTOR times `l2_bytes` are read between two reads of one entry.

        `entry_bytes`: one expert's packed weights, per stack.
        """
        active = [sum(load.tokens_per_expert[expert] > 0 for expert in experts) for experts in members]
        touched = sum(count * size for count, size in zip(active, entry_bytes, strict=True))
        launches = 1 + math.ceil(COLD_L2_FACTOR * l2_bytes / max(1, touched))
        turns = tuple(
            len(experts) // count if count else launches for experts, count in zip(members, active, strict=True)
        )
        return cls(launches=launches, turns=turns, copies=tuple(math.ceil(launches / each) for each in turns))

    def place(self, stack: int, launch: int) -> tuple[int, int]:
        """(copy, turn) of a stack in a launch."""
        return divmod(launch % (self.turns[stack] * self.copies[stack]), self.turns[stack])


def rotated_members(experts: Sequence[int], load: TokenLoad, turn: int) -> list[int]:
    """Which expert each entry of a stack is in one turn: the active ones move on to entries that earlier turns left
    alone.
    """
    active = [expert for expert in experts if load.tokens_per_expert[expert]]
    idle = iter([expert for expert in experts if not load.tokens_per_expert[expert]])
    taken = {(turn * len(active) + index) % len(experts): expert for index, expert in enumerate(active)}
    return [taken[entry] if entry in taken else next(idle) for entry in range(len(experts))]


class CudaDevice:
    """torch's current CUDA device with the kernels of `bundles` (see `Shelf`); the `Device` of
    kernel_gen.sweeping.isolation.
    """

    def __init__(self, bundles: Path, driver: str, rule: SampleRule | None = None) -> None:
        self._shelf = Shelf(bundles)
        self._rule = rule or SampleRule()
        self._clock = GpuClock()
        self._l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "driver": driver}
        self._weights: Weights | None = None
        self._inputs: Inputs | None = None
        self._problem: Measurement | None = None

    def prepare(self, candidate: Candidate) -> None:
        """Make the workload's weights and the load's activations and reference, unless they are there."""
        if self._inputs is not None and self._inputs.serves(candidate):
            return
        self._inputs = self._problem = None
        try:
            if self._weights is None or self._weights.workload != candidate.workload:
                self._weights = None
                torch.cuda.empty_cache()
                self._weights = Weights.make(candidate.workload, "cuda")
            self._inputs = Inputs.make(self._weights, candidate.load, self._l2_bytes)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError as error:
            self._weights = self._inputs = None
            self._problem = _failed(Status.LAUNCH_ERROR, error)
            torch.cuda.empty_cache()
        except torch.AcceleratorError as error:
            self._problem = _failed(Status.LAUNCH_ERROR, error, context_lost=True)

    def measure(self, candidate: Candidate) -> Measurement:
        """Check the candidate's values, then time it. Failures are returned; after a CUDA error the context is lost."""
        if self._inputs is None:
            return self._problem or Measurement.failed(Status.LAUNCH_ERROR, "no inputs were made")
        try:
            return self._measured(self._kernel(candidate), self._inputs)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            return _failed(Status.LAUNCH_ERROR, error)
        except SpecError as error:  # the launcher refuses the arguments; nothing ran
            return _failed(Status.LAUNCH_ERROR, error)
        except (torch.AcceleratorError, LaunchError) as error:  # sticky: nothing more can run in this process
            return _failed(Status.LAUNCH_ERROR, error, context_lost=True)

    def _measured(self, kernel: Kernel, inputs: Inputs) -> Measurement:
        def launcher(experts: Experts) -> Launch:
            def launch() -> None:
                kernel(inputs.activations, experts, inputs.offsets, out=inputs.output.y)

            return launch

        problem = verify(launcher(inputs.experts), inputs.output, inputs.expected, torch.cuda.synchronize)
        if problem:
            return Measurement.failed(Status.WRONG, problem, versions=self._versions)
        for experts in inputs.sets:
            experts.bind(kernel.spec.schemes)  # tables are copied to the GPU, which a capture does not allow
        timing = self._clock.time_launches([launcher(experts) for experts in inputs.sets], self._rule)
        problem = inputs.output.damage()
        if problem:
            return Measurement.failed(Status.WRONG, problem, versions=self._versions)
        return Measurement(
            status=Status.OK,
            latency_us=timing.median_us,
            p20_us=timing.p20_us,
            p80_us=timing.p80_us,
            num_samples=timing.num_samples,
            sm_clock_mhz=timing.sm_clock_mhz,
            versions={
                **self._versions,
                "reference_ratio": f"{timing.reference_ratio:.3f}",
                "ctas_per_sm": str(kernel.ctas_per_sm),  # the build's own, often above what the configuration asks for
            },
        )

    def _kernel(self, candidate: Candidate) -> Kernel:
        bundle, built = self._shelf.find(candidate)
        return Kernel(built.spec, bundle.function(built), built.facts.ctas_per_sm)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """A workload's packed stacks, one a scheme, and which expert each entry is."""

    workload: Workload
    stacks: tuple[PackedWeights, ...]
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def make(cls, work: Workload, device: torch.device | str) -> Weights:
        """Random and quantised. torch.OutOfMemoryError when they do not fit."""
        per_expert = work.schemes * work.num_experts if len(work.schemes) == 1 else work.schemes
        members = tuple(tuple(e for e, scheme in enumerate(per_expert) if scheme == slot) for slot in work.slots)
        stacks = tuple(
            make_stack(slot, len(experts), work.n, work.k, seed, device)
            for seed, (slot, experts) in enumerate(zip(work.slots, members, strict=True))
        )
        return cls(workload=work, stacks=stacks, members=members)

    def sets(self, load: TokenLoad, rotation: Rotation) -> Iterator[Experts]:
        """The experts of each launch of a timed graph."""
        copies = [
            [stack, *(_map_parts(stack, stack.num_experts, torch.clone) for _ in range(count - 1))]
            for stack, count in zip(self.stacks, rotation.copies, strict=True)
        ]
        for launch in range(rotation.launches):
            places = [rotation.place(stack, launch) for stack in range(len(copies))]
            yield Experts(
                [of_stack[copy] for of_stack, (copy, _) in zip(copies, places, strict=True)],
                [rotated_members(experts, load, turn) for experts, (_, turn) in zip(self.members, places, strict=True)],
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """A load's activations, output and reference, and the weights that launches read."""

    weights: Weights
    load: TokenLoad
    activations: Activations
    offsets: Tensor
    output: GuardedOutput
    expected: Expected
    experts: Experts
    sets: tuple[Experts, ...]

    @classmethod
    def make(cls, weights: Weights, load: TokenLoad, l2_bytes: int) -> Inputs:
        """Random activations, and what a launch should give for them. torch.OutOfMemoryError when they do not fit."""
        work, device = weights.workload, weights.stacks[0].blob.device
        generator = torch.Generator(device=device).manual_seed(load.total)
        x = torch.randn(load.total, work.k, generator=generator, device=device).to(torch.bfloat16)
        counts = torch.tensor([0, *load.tokens_per_expert], dtype=torch.int32)
        entry_bytes = [stack.num_bytes // stack.num_experts for stack in weights.stacks]
        return cls(
            weights=weights,
            load=load,
            activations=prepare_activations(x, work.slots),
            offsets=counts.cumsum(0, dtype=torch.int32).to(device),
            output=GuardedOutput.make(load.total, work.n, device),
            expected=reference(x, weights.stacks, weights.members, load),
            experts=Experts(weights.stacks, weights.members),
            sets=tuple(weights.sets(load, Rotation.of(weights.members, entry_bytes, load, l2_bytes))),
        )

    def serves(self, candidate: Candidate) -> bool:
        """Whether these are the candidate's inputs."""
        return self.weights.workload == candidate.workload and self.load == candidate.load


def _failed(status: Status, error: Exception, *, context_lost: bool = False) -> Measurement:
    """The failure with the first line of what was said: torch appends advice for its own users."""
    text = str(error).strip().splitlines()
    return Measurement.failed(status, f"{type(error).__name__}: {text[0] if text else ''}", context_lost=context_lost)


def _parts(stack: PackedWeights) -> list[Tensor]:
    parts = (stack.blob, stack.scale_strip, stack.zero_strip, stack.channel_scales)
    return [part for part in parts if part is not None]


def _map_parts(stack: PackedWeights, num_experts: int, change: Callable[[Tensor], Tensor]) -> PackedWeights:
    """The stack with every tensor changed."""

    def changed(part: Tensor | None) -> Tensor | None:
        return None if part is None else change(part)

    return dataclasses.replace(
        stack,
        num_experts=num_experts,
        blob=change(stack.blob),
        scale_strip=changed(stack.scale_strip),
        zero_strip=changed(stack.zero_strip),
        channel_scales=changed(stack.channel_scales),
    )
