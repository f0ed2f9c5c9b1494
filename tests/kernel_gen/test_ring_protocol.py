"""The wgmma family's ring of stages as a model, searched through every interleaving: producer warps that take k-tiles
in turn, copies that arrive at any time, consumer warps that hold a stage or two and release them.

What a barrier tells is the parity of its phase, so that a warp which is two phases off is not held up. The kernels rely
on stages being released in the order of k-tiles (`kernel_gen.kernels.wgmma_producer`); where an odd last k-tile was
released before the one ahead of it, rings of one stage more than producers filled a stage twice, on a GPU once in some
hundred thousand launches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from kernel_gen.smem_wgmma import producer_warps
from profiles import kernels

Barrier = tuple[int, int]
"""(phases completed, arrivals and copies that this one still waits for)."""


@dataclass(frozen=True, slots=True)
class State:
    """How far every warp is, which copies are under way, and the barriers of each stage."""

    filled: tuple[int, ...]
    copies: frozenset[int]
    consumed: tuple[int, ...]
    full: tuple[Barrier, ...]
    empty: tuple[Barrier, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """`tiles`: k-tiles of one tile after the other; `held`: stages that a consumer reads ahead; `in_order`: whether
    what it holds at a tile's end is released in order.
    """

    stages: int
    producers: int
    consumers: int
    tiles: tuple[int, ...]
    held: int = 2
    in_order: bool = True

    def start(self) -> State:
        return State(
            (0,) * self.producers,
            frozenset(),
            (0,) * self.consumers,
            ((0, 2),) * self.stages,
            ((0, self.consumers),) * self.stages,
        )

    def consumer_steps(self) -> list[tuple[str, int]]:
        """(wait or release, k-tile) of a consumer warp."""
        steps: list[tuple[str, int]] = []
        first = 0
        for count in self.tiles:
            for k_tile in range(first, first + count):
                steps.append(("wait", k_tile))
                if k_tile - first >= self.held:
                    steps.append(("release", k_tile - self.held))
            left = [("release", k_tile) for k_tile in range(first + max(0, count - self.held), first + count)]
            steps += left if self.in_order else left[::-1]
            first += count
        return steps

    def successors(self, state: State, steps: Sequence[tuple[str, int]]) -> Iterator[State]:
        """Where one step of any warp or copy leads. AssertionError where a stage is filled twice."""
        for warp, done in enumerate(state.filled):
            k_tile = warp + done * self.producers
            stage, use = k_tile % self.stages, k_tile // self.stages
            if k_tile < sum(self.tiles) and state.empty[stage][0] % 2 == use % 2:
                phase, waits_for = state.full[stage]
                # Two things complete a full barrier: the producer's arrival, and the bytes that it announced.
                assert waits_for == 2, f"k-tile {k_tile}: stage {stage} is being filled already"
                full = _with(state.full, stage, (phase, 1))
                yield replace(state, filled=_next(state.filled, warp), copies=state.copies | {k_tile}, full=full)
        for k_tile in state.copies:
            full = _with(state.full, k_tile % self.stages, (state.full[k_tile % self.stages][0] + 1, 2))
            yield replace(state, copies=state.copies - {k_tile}, full=full)
        for warp, done in enumerate(state.consumed):
            if done == len(steps):
                continue
            what, k_tile = steps[done]
            stage, use = k_tile % self.stages, k_tile // self.stages
            after = replace(state, consumed=_next(state.consumed, warp))
            if what == "wait" and state.full[stage][0] % 2 != use % 2:
                yield after
            elif what == "release":
                phase, waits_for = state.empty[stage]
                released = (phase, waits_for - 1) if waits_for > 1 else (phase + 1, self.consumers)
                yield replace(after, empty=_with(state.empty, stage, released))

    def search(self) -> int:
        """The number of states. AssertionError where a stage is filled twice, or all wait for each other."""
        steps = self.consumer_steps()
        seen = {self.start()}
        waiting = list(seen)
        while waiting:
            state = waiting.pop()
            found = list(self.successors(state, steps))
            assert found or set(state.consumed) == {len(steps)}, f"deadlock: {state}"
            for after in found:
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        return len(seen)


def _next(counts: tuple[int, ...], index: int) -> tuple[int, ...]:
    return (*counts[:index], counts[index] + 1, *counts[index + 1 :])


def _with(barriers: tuple[Barrier, ...], stage: int, barrier: Barrier) -> tuple[Barrier, ...]:
    return (*barriers[:stage], barrier, *barriers[stage + 1 :])


def producers_of(stages: int) -> int:
    return producer_warps(kernels.parse(f"wgmma_128x8_w4x1x1_s{stages}_k1_at_o1"))


@pytest.mark.parametrize("tiles", [(3, 9), (5, 8), (1, 1, 7)], ids=str)
@pytest.mark.parametrize("stages", [3, 4, 5, 6, 8])
def test_no_stage_is_filled_twice(stages: int, tiles: tuple[int, ...]) -> None:
    assert Ring(stages=stages, producers=producers_of(stages), consumers=1, tiles=tiles).search() > sum(tiles)


@pytest.mark.parametrize("held", [1, 2])
def test_nor_with_two_consumers(held: int) -> None:
    Ring(stages=5, producers=producers_of(5), consumers=2, tiles=(3, 8), held=held).search()


def test_two_stages_serve_loops_that_hold_one() -> None:
    Ring(stages=2, producers=producers_of(2), consumers=2, tiles=(3, 4), held=1).search()


@pytest.mark.parametrize(("stages", "tiles"), [(3, (5, 7)), (5, (3, 9))])
def test_releases_out_of_order_would_fill_one_twice(stages: int, tiles: tuple[int, ...]) -> None:
    """The fault that was: one stage more than producers."""
    with pytest.raises(AssertionError, match=r"already|deadlock"):
        Ring(stages=stages, producers=producers_of(stages), consumers=1, tiles=tiles, in_order=False).search()
