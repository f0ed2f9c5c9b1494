"""All linears of one MoE layer in all schemes: quantised once, and every measure of each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from allocator.calibration.experts import LinearStack, gated
from allocator.calibration.grid import lowest_code
from allocator.calibration.hadamard import Rotation
from allocator.calibration.measures import Change, Measure
from allocator.calibration.quantizer import Prepared, Quantized, Quantizer
from allocator.calibration.statistics import Statistics, gather
from allocator.calibration.visits import ExpertGroup, Rows, Visit
from profiles.errors import SpecError
from profiles.models import Linear, LinearId
from profiles.schemes import QuantScheme

_CPU_BYTES = 2 << 30
_GPU_SHARE = 0.5

Losses = dict[tuple[LinearId, QuantScheme], dict[str, float]]


@dataclass(slots=True, kw_only=True)
class LayerNotes:
    """What a user should know of one layer.

    Attributes:
        never_routed: experts that no token of the data reached.
        few_tokens: experts with fewer tokens than a linear's inputs have features, and how many.
        damping_raised: (expert, linear, scheme) whose second moments needed more damping than asked.
    """

    never_routed: list[int] = field(default_factory=list)
    few_tokens: dict[int, int] = field(default_factory=dict)
    damping_raised: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """How losses are measured.

    Attributes:
        schemes: all that are asked for.
        quantizer: how weights become codes.
        max_rows: tokens of an expert at which changes are measured, evenly spaced; all others still count in GPTQ's
            moments. None: all, which measured KL always takes.
        memory_bytes: of temporaries; more experts than fit are taken in turns. None: much of what a GPU has free, and
            2 GiB on a CPU.
    """

    schemes: tuple[QuantScheme, ...]
    quantizer: Quantizer = field(default_factory=Quantizer)
    max_rows: int | None = 2048
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise SpecError(f"max rows {self.max_rows}: at least 1 is needed")


def layer_losses(
    visit: Visit,
    measures: Sequence[Measure],
    options: LossOptions,
    ahead: Callable[[Tensor, Tensor], float] | None = None,
) -> tuple[Losses, LayerNotes]:
    """Every (linear, scheme) of a layer by every measure, and notes."""
    losses: Losses = {}
    notes = LayerNotes()
    power = sum(float(batch.double().square().sum()) for batch in visit.outputs) / visit.num_tokens
    with torch.no_grad():
        for group in visit.groups():
            _note_tokens(group, notes)
            for experts in turns(group, len(options.schemes), options.memory_bytes):
                statistics = gather(group, experts)
                for linear in Linear:
                    for expert, scheme, change in _changes(
                        visit, group, experts, statistics, linear, options, power, ahead, notes
                    ):
                        block = LinearId(layer=visit.layer.index, expert=expert, linear=linear)
                        losses[block, scheme] = {measure.name: measure.loss(change) for measure in measures}
    return losses, notes


def quantized_stacks(
    group: ExpertGroup,
    experts: range,
    statistics: Statistics,
    linear: Linear,
    schemes: Sequence[QuantScheme],
    quantizer: Quantizer,
) -> Iterator[tuple[QuantScheme, Quantized]]:
    """These experts' linear in each scheme. Schemes that round weights alike share the work."""
    weights = group.experts.base[linear].weights[experts.start : experts.stop]
    done: dict[object, Quantized] = {}
    prepared: dict[Rotation | None, Prepared] = {}
    for scheme in schemes:
        rotation = quantizer.rotation(scheme, weights.shape[-1])
        if rotation not in prepared:
            prepared[rotation] = quantizer.prepare(statistics.moments[linear], statistics.counts, rotation)
        key = (scheme.weights, rotation, lowest_code(scheme))
        if key not in done:
            done[key] = quantizer.quantize(weights, scheme, prepared[rotation], statistics.counts)
        yield scheme, done[key].of(scheme)


def _changes(
    visit: Visit,
    group: ExpertGroup,
    experts: range,
    statistics: Statistics,
    linear: Linear,
    options: LossOptions,
    power: float,
    ahead: Callable[[Tensor, Tensor], float] | None,
    notes: LayerNotes,
) -> Iterator[tuple[int, QuantScheme, Change]]:
    quantized = dict(quantized_stacks(group, experts, statistics, linear, options.schemes, options.quantizer))
    for scheme, result in quantized.items():
        notes.damping_raised += [
            (e + group.first_id + experts.start, linear.value, scheme.name) for e in result.damping_raised
        ]
    stacks = {scheme: result.stack(torch.float32) for scheme, result in quantized.items()}
    most = None if ahead is not None else options.max_rows
    for slot, expert in enumerate(experts):
        rows = group.rows(expert, most)
        exact = _Exact.of(group, expert, rows)
        for scheme, stack in stacks.items():
            change = Change(
                delta=cache(partial(exact.delta, linear, stack, slot)),
                rows=rows,
                gradient=None if visit.gradient is None else visit.gradient[rows.tokens].float(),
                num_tokens=visit.num_tokens,
                output_power=power,
                estimate=partial(exact.estimate, linear, quantized[scheme], stack, slot, statistics),
                ahead=ahead,
            )
            yield expert + group.first_id, scheme, change


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Exact:
    """One expert at some tokens, in float32: x [n, H], hidden = act(gate) * up [n, I], y [n, H]."""

    group: ExpertGroup
    expert: int
    rows: Rows
    x: Tensor
    hidden: Tensor
    y: Tensor
    down: Tensor

    @classmethod
    def of(cls, group: ExpertGroup, expert: int, rows: Rows) -> _Exact:
        base = group.experts.base
        x = group.x[rows.tokens].float()
        down = base[Linear.DOWN].weights[expert].float()
        hidden = gated(x @ base[Linear.GATE_UP].weights[expert].float().T, group.experts.activation)
        return cls(group=group, expert=expert, rows=rows, x=x, hidden=hidden, y=hidden @ down.T, down=down)

    def delta(self, linear: Linear, stack: LinearStack, slot: int) -> Tensor:
        """Change of the block's output when one linear is replaced."""
        if linear is Linear.DOWN:
            changed = stack(self.hidden, slot)
        else:
            changed = gated(stack(self.x, slot), self.group.experts.activation) @ self.down.T
        return (changed - self.y) * self.rows.weights.unsqueeze(-1)

    def estimate(
        self, linear: Linear, quantized: Quantized, stack: LinearStack, slot: int, statistics: Statistics
    ) -> float:
        """Sum over all tokens of |change of the block's output|^2: the weights' error through the inputs' second
        moments, plus the activations' error through the weights; errors of gate and up reach the output through their
        mean gains and the norms of down's columns.
        """
        inputs = self.x if linear is Linear.GATE_UP else self.hidden
        turned = inputs if stack.rotation is None else stack.rotation.apply(inputs)
        weights = self.rows.weights.unsqueeze(-1)
        noise = ((stack.inputs(inputs) - turned) * weights).square().sum(0) * self.rows.multiplicity
        errors = quantized.row_errors[slot] if not self.rows.is_stand_in else self._stand_in_errors(linear, stack, slot)
        errors = errors.float() + stack.weights[slot].square() @ noise
        if linear is Linear.DOWN:
            return float(errors.sum())
        gains = torch.cat((statistics.gate_gain[slot], statistics.up_gain[slot]))
        if self.rows.is_stand_in:
            gains = torch.ones_like(gains)
        return float((errors * gains * self.down.square().sum(0).repeat(2)).sum())

    def _stand_in_errors(self, linear: Linear, stack: LinearStack, slot: int) -> Tensor:
        """Row errors of an expert without moments, at its stand-ins."""
        base = self.group.experts.base[linear].weights[self.expert].float()
        rotated = base if stack.rotation is None else stack.rotation.apply(base)
        inputs = self.x if linear is Linear.GATE_UP else self.hidden
        turned = inputs if stack.rotation is None else stack.rotation.apply(inputs)
        error = (turned @ (stack.weights[slot] - rotated).T) * self.rows.weights.unsqueeze(-1)
        return error.square().sum(0) * self.rows.multiplicity


def _note_tokens(group: ExpertGroup, notes: LayerNotes) -> None:
    features = max(group.experts.base[linear].weights.shape[2] for linear in Linear)
    for expert in range(group.experts.num_experts):
        count = group.count(expert)
        if count == 0:
            notes.never_routed.append(expert + group.first_id)
        elif count < features:
            notes.few_tokens[expert + group.first_id] = count


def turns(group: ExpertGroup, num_schemes: int, memory_bytes: int | None = None) -> Iterator[range]:
    """As many experts at a time as fit: each scheme's values, their working copies and the moments, in float32.

    memory_bytes: None: much of what a GPU has free, and 2 GiB on a CPU.
    """
    up, down = group.experts.base[Linear.GATE_UP].weights, group.experts.base[Linear.DOWN].weights
    largest = max(up[0].numel(), down[0].numel())
    each = 4 * (largest * (num_schemes + 12) + 4 * max(up.shape[2], down.shape[2]) ** 2)
    size = max(1, (memory_bytes or _free_bytes(up.device)) // each)
    for first in range(0, group.experts.num_experts, size):
        yield range(first, min(first + size, group.experts.num_experts))


def _free_bytes(device: torch.device) -> int:
    """What temporaries may take."""
    if device.type != "cuda":
        return _CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _GPU_SHARE)
