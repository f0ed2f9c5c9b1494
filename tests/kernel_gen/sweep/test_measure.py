"""What surrounds a launch, on the CPU: checks of values and bounds, stacks, reference, the rotation for a cold L2."""

from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_gen.experts import Experts
from kernel_gen.formats import Expected, expected_output, pack, quantize, unpack
from kernel_gen.measure import (
    GUARD_ELEMENTS,
    GuardedOutput,
    Inputs,
    Rotation,
    Weights,
    make_stack,
    reference,
    rotated_members,
    verify,
)
from kernel_gen.sweeping.candidates import Candidate, Workload
from profiles import schemes
from profiles.kernels import parse
from profiles.loads import TokenLoad
from profiles.schemes import KERNEL_SCHEMES, QuantScheme

ROWS, COLUMNS = 6, 16


def check(write: Callable[[GuardedOutput, int], None]) -> str | None:
    """What `verify` says of a kernel that does `write(output, run)`; right is a Y of ones."""
    output = GuardedOutput.make(ROWS, COLUMNS, "cpu")
    runs: list[int] = []

    def launch() -> None:
        runs.append(len(runs))
        write(output, runs[-1])

    ones = torch.ones(ROWS, COLUMNS)
    found = verify(launch, output, Expected(y=ones, tolerance=torch.full_like(ones, 1 / 64)), lambda: None)
    assert len(runs) == 2 or found is not None
    return found


def test_a_right_kernel_passes() -> None:
    assert check(lambda output, _: output.y.fill_(1.0)) is None


def test_a_value_left_out_is_found() -> None:
    def all_but_one(output: GuardedOutput, _: int) -> None:
        keep = output.y[2, 3].clone()
        output.y.fill_(1.0)
        output.y[2, 3] = keep

    assert "y[2, 3] is nan, expected 1" in str(check(all_but_one))


def test_a_wrong_value_is_found() -> None:
    assert "96 of 96 values are off" in str(check(lambda output, _: output.y.fill_(1.5)))


@pytest.mark.parametrize(
    ("offset", "said"), [(-1, "1 elements before Y and 0 after"), (ROWS * COLUMNS, "0 elements before Y and 1 after")]
)
@pytest.mark.parametrize("run", [0, 1])
def test_one_element_out_of_bounds_is_found(offset: int, said: str, run: int) -> None:
    def write(output: GuardedOutput, this_run: int) -> None:
        output.y.fill_(1.0)
        if this_run == run:
            output.whole[GUARD_ELEMENTS + offset] = 0

    assert said in str(check(write))


def test_a_second_run_must_give_the_same_bits() -> None:
    def write(output: GuardedOutput, run: int) -> None:
        output.y.fill_(1.0)
        output.y[0, :3] = 1.0 + run / 128

    assert check(write) == "a second run gave 3 other values"


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES, ids=str)
def test_stacks_and_reference_agree_with_the_formats(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, load = 72, 200, TokenLoad(tokens_per_expert=(3, 0, 5, 1), source="test")
    whole = make_stack(scheme, 4, n, k, seed=3, device="cpu")
    monkeypatch.setattr("kernel_gen.measure.CHUNK_BYTES", 4 * n * k)  # one expert at a time
    stack = make_stack(scheme, 4, n, k, seed=3, device="cpu")
    assert torch.equal(stack.blob, whole.blob)
    assert stack.num_bytes == pack(quantize(torch.randn(4, n, k), scheme)).num_bytes
    assert not torch.equal(stack.blob[0], stack.blob[1])
    x = torch.randn(9, k).to(torch.bfloat16)
    plan = torch.tensor([[e, 0, e, 0] for e in range(4)], dtype=torch.int32)
    expected = expected_output(x, [unpack(stack)], plan, torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32))
    found = reference(x, [stack], [[0, 1, 2, 3]], load)
    assert torch.allclose(found.y, expected.y, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.tolerance, expected.tolerance, rtol=1e-3, atol=1e-6)


loads = st.lists(st.integers(0, 3), min_size=1, max_size=24).filter(any)


@given(loads, st.integers(0, 40))
def test_rotated_members_are_a_permutation(tokens: list[int], turn: int) -> None:
    load = TokenLoad(tokens_per_expert=tuple(tokens), source="test")
    experts = list(range(len(tokens)))
    assert sorted(rotated_members(experts, load, turn)) == experts


@given(loads, st.integers(1 << 10, 1 << 20), st.integers(1, 1 << 24), st.randoms())
def test_no_entry_is_read_again_before_l2_has_turned_over(
    tokens: list[int], entry_bytes: int, l2_bytes: int, random: Random
) -> None:
    load = TokenLoad(tokens_per_expert=tuple(tokens), source="test")
    experts = list(range(len(tokens)))
    cut = random.randint(0, len(experts))
    members = [part for part in (experts[:cut], experts[cut:]) if part]
    sizes = [entry_bytes, 3 * entry_bytes][: len(members)]
    rotation = Rotation.of(members, sizes, load, l2_bytes)
    last: dict[tuple[int, int, int], int] = {}
    read_bytes = 0
    for launch in range(2 * rotation.launches):
        before, read = read_bytes, []
        for stack, of_stack in enumerate(members):
            copy, turn = rotation.place(stack, launch % rotation.launches)
            assert copy < rotation.copies[stack]
            for entry, expert in enumerate(rotated_members(of_stack, load, turn)):
                if tokens[expert]:
                    key = stack, copy, entry
                    assert key not in last or before - last[key] >= 2 * l2_bytes
                    read.append(key)
        read_bytes += sum(sizes[stack] for stack, _, _ in read)
        last |= dict.fromkeys(read, read_bytes)
    extra = sum(
        (copies - 1) * len(part) * size for copies, part, size in zip(rotation.copies, members, sizes, strict=True)
    )
    touched = read_bytes / (2 * rotation.launches)
    assert extra <= 2 * (2 * l2_bytes + touched)  # what the copies take beside the stacks


def test_experts_take_rotated_members_of_two_stacks() -> None:
    first, second = schemes.parse("w4a16_g128_sym"), schemes.parse("w8a8_g-1_sym")
    stacks = [make_stack(first, 3, 64, 128, 0, "cpu"), make_stack(second, 2, 64, 128, 1, "cpu")]
    load = TokenLoad(tokens_per_expert=(1, 0, 2, 0, 4), source="test")
    members = [[0, 2, 3], [1, 4]]
    rotation = Rotation.of(members, [stack.num_bytes // stack.num_experts for stack in stacks], load, 0)
    assert (rotation.launches, rotation.turns, rotation.copies) == (1, (1, 2), (1, 1))
    turned = Experts(stacks, [rotated_members(experts, load, 1) for experts in members])
    plan = {row[0]: row[1:3] for row in turned.bind((first, second)).plan.tolist()}
    assert sorted(plan) == [0, 1, 2, 3, 4]
    assert plan[0] == [0, 2]
    assert plan[4] == [1, 1]


def test_inputs_of_a_mixed_workload_are_what_a_launch_needs() -> None:
    slots = (schemes.parse("w4a16_g128_sym"), schemes.parse("w8a8_g-1_sym"))
    work = Workload(model="m", linear="down", num_experts=4, n=72, k=160, schemes=(*slots, *slots), label="mix")
    load = TokenLoad(tokens_per_expert=(2, 5, 0, 1), source="test")
    inputs = Inputs.make(Weights.make(work, "cpu"), load, l2_bytes=1000)
    assert inputs.offsets.tolist() == [0, 2, 7, 7, 8]
    assert inputs.experts.scheme_of_expert == work.schemes
    assert len(inputs.sets) > 1
    assert all(experts.scheme_of_expert == work.schemes for experts in inputs.sets)
    for slot in range(2):  # each slot has one active expert of two at least, so no launch repeats another's entry
        places = [
            (experts.bind(slots).weights[slot, 0].item(), experts.bind(slots).plan[:, 2].tolist())
            for experts in inputs.sets
        ]
        assert len({str(place) for place in places}) == len(places)

    def launch() -> None:  # a right kernel, by other means
        x = inputs.activations.tensors[0]
        stacks = [unpack(stack) for stack in inputs.weights.stacks]
        found = expected_output(x, stacks, inputs.experts.bind(slots).plan, inputs.offsets)
        inputs.output.y.copy_(found.y)

    assert verify(launch, inputs.output, inputs.expected, lambda: None) is None
    config = parse("mma_64x8_w4x1x1_s2_k1_at_o1")
    assert inputs.serves(Candidate(workload=work, load=load, config=config))
    other = TokenLoad(tokens_per_expert=(2, 5, 1, 0), source="test")
    assert not inputs.serves(Candidate(workload=work, load=other, config=config))
