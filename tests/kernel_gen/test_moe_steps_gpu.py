"""Each step around the GEMMs against torch's operators: bit for bit where both round once."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cutlass")

from kernel_gen.experts import Experts  # noqa: E402
from kernel_gen.formats import quantize_activations  # noqa: E402
from kernel_gen.layer import plain  # noqa: E402
from kernel_gen.layer.fused import MAX_RANKED_IDS, FusedSteps  # noqa: E402
from kernel_gen.layer.routing import Routing  # noqa: E402
from kernel_gen.layouts import activation_kind  # noqa: E402
from kernel_gen.library import library_of  # noqa: E402
from profiles import schemes  # noqa: E402
from profiles.errors import UnsupportedError  # noqa: E402

pytestmark = pytest.mark.gpu

BF16, INT8, E4M3 = "w16a16", "w8a8_g-1_sym", "w8a8_g-1_sym_e4m3"
INT4, GROUP = "w4a4_g-1_sym", "w4a4_g128_sym"
FAR = 1 << 40


def steps_of(names, *, experts=12, hidden=64, intermediate=64) -> tuple[FusedSteps, Experts, Experts]:
    """Expert e's scheme is names[e % len(names)] in both linears; the weights do not matter."""
    per_expert = [schemes.parse(names[e % len(names)]) for e in range(experts)]
    gate_up = Experts.from_weights(torch.zeros(experts, 2 * intermediate, hidden, device="cuda"), per_expert)
    down = Experts.from_weights(torch.zeros(experts, hidden, intermediate, device="cuda"), per_expert)
    return FusedSteps(gate_up, down, library_of(0)), gate_up, down


def draw_ids(kind, tokens, top_k, experts, dtype=torch.int64):
    generator = torch.Generator("cuda").manual_seed(tokens * 31 + top_k)
    if kind == "one expert":
        return torch.full((tokens, top_k), experts // 2, dtype=dtype, device="cuda")
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator, device="cuda")
    if kind == "some out of range":
        wrong = torch.tensor([-1, experts, -FAR, FAR], device="cuda")
        ids = torch.where(ids % 3 == 0, wrong[ids % 4], ids)
    if kind == "all out of range":
        ids = ids + experts
    return ids.clamp(-(1 << 31), (1 << 31) - 1).to(dtype) if dtype == torch.int32 else ids.to(dtype)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, or -1."""
    fresh = torch.empty

    def empty(*shape, **options):
        made = fresh(*shape, **options)
        made.view(torch.uint8).fill_(255)
        return made

    monkeypatch.setattr(torch, "empty", empty)


def same_routing(found: Routing, expected: Routing) -> None:
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.positions, expected.positions)


@pytest.mark.parametrize("kind", ["uniform", "one expert", "some out of range", "all out of range"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (7, 3), (128, 8), (129, 8), (2049, 8)])
def test_places_are_a_stable_sort(kind, dtype, tokens, top_k, poisoned) -> None:
    steps, *_ = steps_of((BF16,), experts=60)
    if dtype == torch.uint8 and "range" in kind:
        pytest.skip("ids below zero need a sign")
    ids = draw_ids(kind, tokens, top_k, 60, dtype)
    found = steps.route(ids)
    same_routing(found, plain.route(ids, 60))
    same_routing(steps.route(ids), found)


@pytest.mark.parametrize("experts", [1, 2, 31, 32, 33, 128, 1000, 1024])
def test_places_with_any_number_of_experts(experts, poisoned) -> None:
    steps, *_ = steps_of((BF16,), experts=experts)
    for kind in ("uniform", "some out of range"):
        ids = draw_ids(kind, 700, 5, experts)
        same_routing(steps.route(ids), plain.route(ids, experts))
        hidden = torch.zeros(700, 64, dtype=torch.bfloat16, device="cuda")
        same_routing(steps.gather(hidden, ids, None, for_swiglu=False)[0], plain.route(ids, experts))


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="1025 experts, at most 1024"):
        steps_of((BF16,), experts=1025)


def check_rows(found, values, routing, experts) -> None:
    """Every row that an expert reads is `values`' row, quantised as that expert's scheme says, padding included."""
    ends = routing.offsets.tolist()
    tensors = {}
    remaining = list(found.tensors)
    for kind in (kind for kind in type(activation_kind(experts.schemes[0])) if kind in kinds_in(experts)):
        tensors[kind] = (remaining.pop(0), None if kind.value == "bf16" else remaining.pop(0))
    assert not remaining
    wholes = {}
    for expert, scheme in enumerate(experts.scheme_of_expert):
        kind, rows = activation_kind(scheme), slice(ends[expert], ends[expert + 1])
        if kind not in wholes:
            wholes[kind] = quantize_activations(values, scheme)
        codes, scales = tensors[kind]
        assert torch.equal(codes[rows].view(torch.uint8), wholes[kind].codes[rows].view(torch.uint8)), kind
        if scales is not None:
            assert torch.equal(scales[rows], wholes[kind].scales[rows]), kind


def kinds_in(experts):
    return {activation_kind(scheme) for scheme in experts.schemes}


MIXES = [(BF16,), (INT8,), (E4M3,), (INT4,), (BF16, INT8, E4M3), (BF16, GROUP)]


@pytest.mark.parametrize("names", MIXES, ids="+".join)
@pytest.mark.parametrize(("hidden_size", "tokens", "top_k"), [(64, 1, 1), (200, 5, 3), (250, 33, 8), (4096, 140, 2)])
@pytest.mark.parametrize("ranks", [True, False])
def test_gathered_tokens_are_quantised_as_by_torch(names, hidden_size, tokens, top_k, ranks, poisoned) -> None:
    steps, gate_up, _ = steps_of(names, hidden=hidden_size)
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device="cuda").to(torch.bfloat16)
    hidden *= torch.logspace(-4, 3, tokens, device="cuda", dtype=torch.bfloat16)[:, None]
    hidden[tokens // 2] = 0
    ids = draw_ids("some out of range" if tokens > 1 else "uniform", tokens, top_k, 12)
    expected = plain.route(ids, 12)
    routing, x = steps.gather(hidden, ids, None if ranks else expected, for_swiglu=True)
    same_routing(routing, expected)
    rows = torch.empty(tokens * top_k, hidden_size, dtype=torch.bfloat16, device="cuda")
    rows[expected.positions.flatten()] = hidden.repeat_interleave(top_k, 0)
    check_rows(x, rows, expected, gate_up)
    _, again = steps.gather(hidden, ids, None if ranks else expected, for_swiglu=True)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(x.tensors, again.tensors, strict=True)
    )


@pytest.mark.parametrize("columns", [128, 126])
def test_tokens_may_be_part_of_wider_rows(columns, poisoned) -> None:
    steps, gate_up, _ = steps_of((BF16, INT8), hidden=columns)
    wide = torch.randn(9, 131, device="cuda").to(torch.bfloat16)
    ids = draw_ids("uniform", 9, 2, 12)
    for hidden in (wide[:, :columns], wide[:, 1 : 1 + columns], wide[:, :columns].t().contiguous().t()):
        routing, x = steps.gather(hidden, ids, None, for_swiglu=False)
        rows = torch.empty(18, columns, dtype=torch.bfloat16, device="cuda")
        rows[routing.positions.flatten()] = hidden.repeat_interleave(2, 0)
        check_rows(x, rows, routing, gate_up)


def test_a_token_that_is_not_finite_shows_in_its_scale() -> None:
    steps, *_ = steps_of((INT8,), hidden=64)
    hidden = torch.ones(3, 64, dtype=torch.bfloat16, device="cuda")
    hidden[0, 5], hidden[1, 63] = torch.nan, torch.inf
    routing, x = steps.gather(hidden, draw_ids("uniform", 3, 1, 12), None, for_swiglu=False)
    scales = x.tensors[1][routing.positions.flatten(), 0]
    assert not scales[:2].isfinite().any()
    assert scales[2] == torch.tensor(1 / 127)


@pytest.mark.parametrize("names", MIXES, ids="+".join)
@pytest.mark.parametrize("intermediate", [64, 200, 250, 1408, 14336])
def test_swiglu_rounds_once_and_quantises_as_torch(names, intermediate, poisoned) -> None:
    tokens, top_k = 21, 3
    steps, _, down = steps_of(names, intermediate=intermediate)
    ids = draw_ids("some out of range", tokens, top_k, 12)
    hidden = torch.zeros(tokens, 64, dtype=torch.bfloat16, device="cuda")
    routing, _ = steps.gather(hidden, ids, None, for_swiglu=True)
    generator = torch.Generator("cuda").manual_seed(2)
    padded = -(-2 * intermediate // 8) * 8
    gate_up = (3 * torch.randn(tokens * top_k, padded, generator=generator, device="cuda")).to(torch.bfloat16)
    gate_up = gate_up[:, : 2 * intermediate]
    rows = int(routing.offsets[-1])
    only_bf16, *_ = steps_of((BF16,), intermediate=intermediate)
    product = only_bf16.swiglu(gate_up, routing).tensors[0][:, :intermediate]
    gate, up = gate_up[:rows].double().chunk(2, dim=1)
    exact = gate * torch.sigmoid(gate) * up
    # bf16's 8 bits: half a unit in the last place is 2^-8 of the value at most; and what ex2 and rcp add.
    assert ((product[:rows].double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.01 + 1e-38).all()
    check_rows(steps.swiglu(gate_up, routing), product, routing, down)
    if intermediate % 8 == 0:  # what a GEMM's epilogue leaves
        check_rows(steps.quantize(product.contiguous(), routing), product, routing, down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("hidden_size", "tokens", "top_k"), [(64, 1, 1), (250, 33, 8), (2048, 7, 4), (4096, 300, 6)])
def test_combine_adds_in_the_routers_order(dtype, hidden_size, tokens, top_k, poisoned) -> None:
    steps, *_ = steps_of((BF16,), hidden=hidden_size)
    ids = draw_ids("some out of range", tokens, top_k, 12)
    routing = plain.route(ids, 12)
    generator = torch.Generator("cuda").manual_seed(3)
    padded = -(-hidden_size // 8) * 8
    y = torch.randn(tokens * top_k, padded, generator=generator, device="cuda").to(torch.bfloat16)[:, :hidden_size]
    y[int(routing.offsets[-1]) :] = torch.nan
    weights = torch.rand(tokens, top_k, generator=generator, device="cuda").to(dtype)
    sums = torch.zeros(tokens, hidden_size, device="cuda")
    for choice in range(top_k):
        rows = routing.positions[:, choice]
        part = y[rows].float() * weights[:, choice, None].float()
        sums = sums + torch.where((rows < routing.offsets[-1])[:, None], part, 0.0)
    out = steps.combine(y, routing, weights)
    assert torch.equal(out, sums.to(torch.bfloat16))
    close = plain.combine(y, routing, weights)
    assert torch.allclose(out.float(), close.float(), atol=2e-2, rtol=2e-2)


def test_few_ids_are_ranked_by_the_gather_itself() -> None:
    steps, *_ = steps_of((BF16,))
    tokens = MAX_RANKED_IDS // 8
    ids = draw_ids("uniform", tokens, 8, 12)
    hidden = torch.zeros(tokens, 64, dtype=torch.bfloat16, device="cuda")
    same_routing(steps.gather(hidden, ids, None, for_swiglu=False)[0], plain.route(ids, 12))


def test_more_choices_than_registers_hold_are_refused() -> None:
    steps, *_ = steps_of((BF16,))
    hidden = torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(UnsupportedError, match="top_k 33, at most 32"):
        steps.gather(hidden, draw_ids("uniform", 2, 33, 12), None, for_swiglu=False)


@pytest.mark.parametrize("names", [(BF16,), (BF16, E4M3)], ids="+".join)
def test_overlapping_launches_give_the_same_bits(names) -> None:
    """Steps one after the other without a GEMM between, so that each waits for the one before it by itself."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("launches overlap from sm_90 on")
    steps, gate_up, down = steps_of(names, hidden=4096, intermediate=2048)
    apart = FusedSteps(gate_up, down, library_of(0), overlap=False)
    generator = torch.Generator("cuda").manual_seed(4)
    hidden = torch.randn(900, 4096, generator=generator, device="cuda").to(torch.bfloat16)
    weights = torch.rand(900, 6, generator=generator, device="cuda")
    ids = draw_ids("some out of range", 900, 6, 12)

    def chain(steps: FusedSteps) -> list[torch.Tensor]:
        routing, x = steps.gather(hidden, ids, steps.route(ids), for_swiglu=True)
        rows = int(routing.offsets[-1])
        wide = torch.zeros(900 * 6, 4096, dtype=torch.bfloat16, device="cuda")
        wide[:rows] = 1.5
        product = steps.swiglu(wide, routing)
        out = steps.combine(wide, routing, weights)
        return [out, *(tensor[:rows].view(torch.uint8).clone() for tensor in (*x.tensors, *product.tensors))]

    one_kind = len(names) == 1
    expected = chain(apart)
    for _ in range(20):
        found = chain(steps)
        assert torch.equal(found[0], expected[0])
        if one_kind:  # with two, each row's other form is left as it was
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
