"""How a launch's tiles fall to CTAs: whole rounds, then one that is not full, and what each resource needs in them.

CTA i takes tiles i, i + grid, ...: after `num` rounds in which every CTA has a tile, `rest` CTAs have one more. That
last round shares each SM among fewer CTAs, so its tiles are faster, but no other hides what they wait for. The launch
ends with CTA 0, which takes the longest tile of each full round, or with the longest of the last; a resource's part of
the makespan is what it would be if that were the only resource, its own longest tiles first. Where an expert's last
token tile may be narrower than the others, a round takes the narrowest tile's time and what wider ones take above it in
the CTA that gets most of them is shared evenly among rounds.

Parts, the makespan, and what `phased` makes of one scheme's parts, whatever their factors, never fall when an expert
gets more tokens: a tile takes no longer in the partial round than in a full one, and the norms of two addends are
together no less than that of their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodel.launches import LaunchTable
from costmodel.terms import Terms
from costmodel.tiles import TILE_PARTS, TileCosts

Array = npt.NDArray[np.float64]
NormOfTwo = Callable[[Array, Array], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the makespan in microseconds, [R]: of all rounds, and of the last, partial one alone."""

    total: Array
    last: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """When a launch of one scheme reads its weights, [R]. Each round of `full_rounds` takes as many tiles as there are
    resident CTAs. The first `rounds` of them read other weights in every tile, `round_us` of DRAM time; then there are
    `rest_us` left to read, in the partial round if `is_rest_last`, else in a full one.
    """

    full_rounds: Array
    rounds: Array
    round_us: Array
    rest_us: Array
    is_rest_last: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turns:
    """Slots in the order in which their tiles are taken, [R, S]: what one of them is in a full round, and the rounds
    `begin` up to `end` that begin with one; `last` [R] is the longest of the partial round, which need not be its
    first: what takes longest on a full SM may not do so alone.
    """

    each: Array
    begin: Array
    end: Array
    last: Array


class Rounds:
    """The rounds of a table of launches."""

    def __init__(self, terms: Terms, tiles: TileCosts) -> None:
        table, num_sms = terms.table, terms.gpu.num_sms
        self._terms = terms
        self.resident = num_sms * table.ctas_per_sm
        self.num_tiles = table.num_tiles.sum(axis=1)
        self.num = np.floor(self.num_tiles / self.resident)
        self.rest = self.num_tiles - self.num * self.resident
        # The first CTAs go to one SM after another; how those of a later round are spread nobody knows.
        mean = self.rest / num_sms
        on_sm = np.where(self.num > 0, mean + terms.constants.uneven_ctas, np.ceil(mean))
        self._full, self._last = tiles.full, tiles.narrow.at(np.clip(on_sm, 1.0, table.ctas_per_sm))
        self._wider = self._widening(tiles.widening)

    def parts(self) -> dict[str, Part]:
        """The makespan's parts, by the names of TILE_PARTS."""
        share = np.where(self.rest > 0, 1.0 / (self.num + 1.0), 0.0)
        in_full, in_last = self._taken()
        total, last = in_full + in_last + self._wider, in_last + self._wider * share
        return {name: Part(total=total[part], last=last[part]) for part, name in enumerate(TILE_PARTS)}

    def _taken(self) -> tuple[Array, Array]:
        """What CTA 0's tiles take in the full rounds and in the last one, [len(TILE_PARTS), R] each."""
        if self._full.shape[2] == 1:
            return self._full[:, :, 0] * self.num, self._last[:, :, 0] * (self.rest > 0)
        turns = self._turns(self._full, self._last, self._terms.table.num_tiles)
        return (turns.each * (turns.end - turns.begin)).sum(axis=-1), turns.last

    def _turns(self, full: Array, last: Array, tiles: Array) -> _Turns:
        """Whose tile the first CTA takes, round by round, if those come first that take longest in a full round. `full`
        and `last` may have an axis before [R, S], of which each goes by itself.
        """
        resident, total = self.resident[:, None], tiles.sum(axis=-1)[:, None]
        num = np.floor(total / resident)
        if tiles.shape[1] == 1:
            of_last = np.where(total > num * resident, last, 0.0)[:, 0]
            return _Turns(each=full, begin=np.zeros_like(num), end=num, last=of_last)
        order = np.argsort(-np.where(tiles > 0, full, -1.0), axis=-1, kind="stable")
        in_order = np.take_along_axis(np.broadcast_to(tiles, order.shape), order, axis=-1)
        ends = np.cumsum(in_order, axis=-1)
        begins = ends - in_order
        in_last = (in_order > 0) & (num * resident < ends)
        return _Turns(
            each=np.take_along_axis(full, order, axis=-1),
            begin=np.minimum(np.ceil(begins / resident), num),
            end=np.minimum(np.ceil(ends / resident), num),
            last=np.where(in_last, np.take_along_axis(last, order, axis=-1), 0.0).max(axis=-1),
        )

    def makespan(self, norm_of: NormOfTwo) -> Array:
        """All rounds, [R], each the `norm_of` its longest tile and the DRAM time of weights. Those are read by the
        first tiles that need them, or evenly in all rounds: whichever takes less, since neighbours on the tile list
        share theirs.
        """
        table, resident = self._terms.table, self.resident[:, None]
        num_rounds = np.maximum(self.num + (self.rest > 0), 1.0)
        wider = (self._wider[0] / num_rounds)[:, None]
        tiles = self._turns(self._full[0], self._last[0], table.num_tiles)
        weight_tiles, tile_us = self._weight_tiles(), self._tile_dram_us()
        evenly = ((weight_tiles * tile_us).sum(axis=1) / num_rounds)[:, None]
        streams = np.floor(weight_tiles.sum(axis=1, keepdims=True) / resident)
        left = weight_tiles.sum(axis=1, keepdims=True) - streams * resident
        read = self._turns(resident * tile_us, left * tile_us, weight_tiles)
        is_rest_last = streams[:, 0] == self.num
        # Full rounds that read all the time, the one that reads the rest, those that find everything in L2.
        read_us = np.column_stack([read.each, np.where(is_rest_last, 0.0, read.last), np.zeros(len(table))])
        after = np.minimum(streams + 1.0, self.num[:, None])
        begin, end = np.hstack([read.begin, streams, after]), np.hstack([read.end, after, self.num[:, None]])
        first, even = np.zeros(len(table)), np.zeros(len(table))
        for slot in range(tiles.each.shape[1]):
            each, tile_begin, tile_end = (
                (of_slot[:, slot, None]) for of_slot in (tiles.each + wider, tiles.begin, tiles.end)
            )
            shared = np.maximum(np.minimum(end, tile_end) - np.maximum(begin, tile_begin), 0.0)
            first += (norm_of(np.broadcast_to(each, read_us.shape), read_us) * shared).sum(axis=1)
            even += (norm_of(each, evenly) * (tile_end - tile_begin))[:, 0]
        has_last = self.rest > 0
        of_last = np.where(has_last, tiles.last + wider[:, 0], 0.0)
        first += norm_of(of_last, np.where(is_rest_last, read.last, 0.0))
        even += norm_of(of_last, np.where(has_last, evenly[:, 0], 0.0))
        return np.minimum(first, even)

    def _weight_tiles(self) -> Array:
        """Tiles that read weights which no other tile reads, [R, S]."""
        table = self._terms.table
        return np.asarray(table.num_active * (table.num_feature_tiles * table.split_k)[:, None], dtype=np.float64)

    def _tile_dram_us(self) -> Array:
        """DRAM's time for the weights of one tile, [R, S]."""
        table = self._terms.table
        tiles_of_expert = (table.num_feature_tiles * table.split_k)[:, None]
        return np.asarray(self._terms.dram_us_of(table.expert_weight_bytes) / tiles_of_expert, dtype=np.float64)

    def _widening(self, more: Array) -> Array:
        """What wider tiles than the narrowest take more, [len(TILE_PARTS), R]; `more` [len(TILE_PARTS), R, S]: of one
        tile. CTAs get them as by lot: some CTA has `uneven_widths` standard deviations above the mean, but at most one
        a round, and never less than the one tile of the largest expert takes.
        """
        table, least = self._terms.table, self._terms.table.least_width[:, None]
        if bool((least == 1.0).all()):
            return np.zeros(more.shape[:2])
        room = np.where(least < 1.0, 1.0 - least, 1.0)
        each = np.maximum(table.num_full_tiles - least * table.num_tiles, 0.0) / room / self.resident[:, None]
        of_one = (_widest(table) - least) / room
        mean, rounds = each.sum(axis=1), np.maximum(self.num + (self.rest > 0), 1.0)
        # Of mixed schemes the least difference: with it the whole never falls when one of them gets more tokens.
        spread = self._terms.constants.uneven_widths * np.sqrt(mean * np.maximum(1.0 - mean / rounds, 0.0))
        above = np.minimum(spread, rounds - mean) * np.where(table.used, more, np.inf).min(axis=2)
        return np.asarray(np.maximum((more * each).sum(axis=2) + above, (more * of_one).max(axis=2)), dtype=np.float64)

    def streaming(self) -> Streaming:
        """Of launches with one scheme; of others, one full round without anything to read."""
        mixed = self._terms.table.used.sum(axis=1) > 1
        weight_tiles, tile_us = self._weight_tiles()[:, 0], self._tile_dram_us()[:, 0]
        rounds = np.floor(weight_tiles / self.resident)
        return Streaming(
            full_rounds=np.where(mixed, 1.0, self.num),
            rounds=np.where(mixed, 0.0, rounds),
            round_us=np.where(mixed, 0.0, self.resident * tile_us),
            rest_us=np.where(mixed, 0.0, (weight_tiles - rounds * self.resident) * tile_us),
            is_rest_last=np.where(mixed, 0.0, rounds == self.num),
        )


def _widest(table: LaunchTable) -> Array:
    """The widest tile of each slot, [R, S], as a share of the full width: the narrowest that takes the largest
    expert's tokens, doubled until it does.
    """
    least = table.least_width[:, None]
    needed = np.clip(table.max_tokens / table.tile_n[:, None], least, 1.0)
    return np.asarray(np.where(table.num_tiles > 0, least * np.exp2(np.ceil(np.log2(needed / least))), least))


def phased(full: Array, last: Array, streaming: Streaming, norm_of: NormOfTwo) -> Array:
    """`Rounds.makespan` from one scheme's columns, [R]: `full` and `last` are what a full and the last round take.
    Weights are read by the first tiles that need them; reading them evenly made factors fitted to measurements worse.
    """
    s = streaming
    in_rest = np.where(s.is_rest_last > 0, norm_of(last, s.rest_us), norm_of(full, s.rest_us) + last)
    without = np.maximum(s.full_rounds - s.rounds - 1.0, 0.0) * full
    return np.asarray(s.rounds * norm_of(full, s.round_us) + in_rest + without, dtype=np.float64)
