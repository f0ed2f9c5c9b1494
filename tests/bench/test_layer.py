"""bench.layer without a GPU: allocations, cells, what is compiled, and the report of rows like those it measures."""

import contextlib

import pandas as pd
import pytest

torch = pytest.importorskip("torch")

from bench.kernel_sets import Standing, shared  # noqa: E402
from bench.layer import building, report  # noqa: E402
from bench.layer.__main__ import main  # noqa: E402
from bench.layer.allocations import ALLOCATIONS, BF16, MIXED, UNIFORM, Group, allocation, average_bits  # noqa: E402
from bench.layer.building import Plan, build_gemms, left_out, specs_needed, steps_needed  # noqa: E402
from bench.layer.cells import Cell, Given  # noqa: E402
from bench.layer.contenders import FUSIONS, Variant  # noqa: E402
from bench.layer.layers import SteppedLayer, torch_layer  # noqa: E402
from bench.layer.limits import gemms_us  # noqa: E402
from bench.layer.measuring import read_measured  # noqa: E402
from bench.layer.reference import expected_output  # noqa: E402
from bench.layer.weights import LayerWeights, SchemeShare, num_sets  # noqa: E402
from kernel_gen.moe import Fusion  # noqa: E402
from profiles.errors import DataError, SpecError  # noqa: E402
from profiles.gpus import gpu  # noqa: E402
from profiles.models import Linear, MoeShape, model  # noqa: E402

CELL = Cell(model="qwen1.5-moe-a2.7b", tokens=16)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("mix", MIXED, ids=lambda mix: mix.name)
def test_a_mix_follows_the_rule(mix, name) -> None:
    shape, cell = model(name), Cell(model=name, tokens=16)
    popularity = cell.popularity()
    found = mix.schemes(shape, popularity)
    assert average_bits(found, shape) <= mix.max_bits
    order = sorted(range(shape.num_experts), key=lambda expert: popularity[expert])
    for schemes in found.values():
        assert len(schemes) == shape.num_experts
        assert len(set(schemes)) <= 4
        least, most = schemes[order[0]], schemes[order[-1]]
        assert least == (mix.low[0][0] if mix.low else mix.middle)
        assert most in (mix.high, mix.middle)
    if mix.high is not None:  # not one more linear can have it
        raised = sum(schemes.count(mix.high) for schemes in found.values())
        step = average_bits(uniform(shape, mix.high, Linear.DOWN, mix.middle), shape) - average_bits(
            uniform(shape, mix.middle, Linear.DOWN, mix.middle), shape
        )
        assert raised == 2 * shape.num_experts or average_bits(found, shape) + step / shape.num_experts > mix.max_bits


def uniform(shape, scheme, linear, other):
    """One linear's experts in a scheme, the rest in another."""
    return {each: (scheme if each is linear else other,) * shape.num_experts for each in Linear}


def test_an_allocation_does_not_know_the_batch() -> None:
    assert Cell(model=CELL.model, tokens=1).schemes(MIXED[0]) == Cell(model=CELL.model, tokens=8192).schemes(MIXED[0])


def test_groups_and_names() -> None:
    assert BF16.group is Group.BF16
    assert {item.group for item in UNIFORM} == {Group.UNIFORM}
    assert {item.group for item in MIXED} == {Group.MIXED}
    assert [allocation(item.name) for item in ALLOCATIONS] == list(ALLOCATIONS)
    with pytest.raises(SpecError, match="allocation 'none': known are w16a16; "):
        allocation("none")


def test_a_cell_draws_the_same_every_time() -> None:
    given, again = CELL.given("cpu"), CELL.given("cpu")
    assert all(torch.equal(a, b) for a, b in zip(given.tensors, again.tensors, strict=True))
    assert sum(given.counts) == given.ids.numel() == 64
    assert all(len(set(row)) == 4 for row in given.ids.tolist())
    assert torch.allclose(given.weights.sum(1), torch.ones(16))
    assert CELL.counts() == given.counts


def plan(*names: str, tokens: int = 16, **options) -> Plan:
    cells = (Cell(model=CELL.model, tokens=tokens),)
    fusions = options.pop("fusions", (FUSIONS["all"],))
    return Plan(
        cells=cells,
        allocations=tuple(map(allocation, names)),
        gpu=gpu("h200"),
        num_configs=2,
        fusions=fusions,
        **options,
    )


def test_every_launch_is_built_before() -> None:
    mix = MIXED[0]
    specs = specs_needed(plan(mix.name))
    assert {len(spec.schemes) for spec in specs} == {1, 3}
    assert len(set(specs)) == len(specs)
    whole = [spec for spec in specs if len(spec.schemes) == 3]
    assert {(spec.swiglu, spec.overlap, spec.prefetch) for spec in whole} == {(True, True, False), (False, True, True)}
    shares = [spec for spec in specs if spec.schemes == (mix.middle,)]
    assert {spec.overlap for spec in shares} == {True, False}  # one after the other, and on streams
    four = specs_needed(plan(mix.name, fusions=tuple(FUSIONS.values())))
    assert {(spec.swiglu, spec.overlap) for spec in four} == {(a, b) for a in (True, False) for b in (True, False)}


@pytest.fixture
def known(monkeypatch) -> dict:
    """What the cache knows of kernels, in place of this machine's."""
    found: dict = {}
    for room in ("bench.layer.building", "bench.kernel_sets"):
        monkeypatch.setattr(f"{room}.standing", lambda spec, gpu: found.get(spec, Standing.UNKNOWN))
    building._choices.cache_clear()
    yield found
    building._choices.cache_clear()


def test_only_kernels_that_are_built(known) -> None:
    mix = MIXED[0]
    every = specs_needed(plan(mix.name))
    known |= dict.fromkeys(every[::2], Standing.MAY_RUN)
    assert set(specs_needed(plan(mix.name, built_only=True))) <= set(every[::2])
    known |= dict.fromkeys(every, Standing.MAY_RUN)
    assert set(specs_needed(plan(mix.name, tokens=17, built_only=True))) <= set(every)


def test_what_the_gate_refuses_is_replaced(known, monkeypatch) -> None:
    """As many as can be: other configurations are compiled for those that turn out to spill."""
    wanted = plan(MIXED[0].name)
    first = specs_needed(wanted)
    compiled = []

    def compile_some(specs, target):
        new = [spec for spec in specs if spec not in known]
        compiled.append(len(new))
        bad = {spec.config for spec in first if len(spec.schemes) > 1}
        known.update({spec: Standing.REFUSED if spec.config in bad else Standing.MAY_RUN for spec in new})
        return 0

    monkeypatch.setattr("bench.kernel_sets.compile_all", compile_some)
    last = build_gemms(wanted)
    assert len(compiled) > 1
    assert all(known[spec] is Standing.MAY_RUN for spec in last)
    assert {spec.config for spec in last if len(spec.schemes) > 1}.isdisjoint(
        spec.config for spec in first if len(spec.schemes) > 1
    )


def test_launches_share_their_kernels() -> None:
    a, b, c, d = "abcd"
    assert shared([(a, b, c), (a, c, b)], 1) == [a]
    assert shared([(a, b), (c, d)], 1) == [a, c]  # the first of each, whatever the others share
    assert shared([(a,), ()], 3) == [a]
    assert shared([(a, b, c, d), (a, c, b, d), (a, d, c, b)], 2) == [a, b, c, d]  # the first two of each
    assert shared([(a, b, c, d), (a, b, d, c), (b, a, d, c)], 3) == [a, b, c]


def test_a_mix_of_one_scheme_is_none() -> None:
    mixtral = Plan(
        cells=(Cell(model="mixtral-8x7b", tokens=16),),
        allocations=(allocation("w4a8/w8a8 fp8"), allocation("w4a8/w8a8 int8 by row")),
        gpu=gpu("h200"),
        num_configs=1,
        fusions=(FUSIONS["four"],),
    )
    assert [each.name for each in mixtral.of(mixtral.cells[0])] == ["w16a16", "w4a8/w8a8 int8 by row"]


def test_fusions_are_left_out_one_by_one() -> None:
    assert len(left_out(FUSIONS["all"])) == 7
    assert Fusion.EPILOGUE not in left_out(Fusion.ALL)[list(Fusion).index(Fusion.SWIGLU)]
    assert len(left_out(FUSIONS["four"])) == 4


class Recording:
    """A library on no GPU: it hands out steps that do nothing, and remembers which."""

    def __init__(self) -> None:
        self.gpu, self.bundle, self.asked = gpu("h200"), None, set()

    def step(self, spec):
        self.asked.add(spec)
        return lambda *arguments: None


@pytest.mark.parametrize("tokens", [16, 2048])
@pytest.mark.parametrize("name", ["w16a16", "w2a16/w4a8/w8a8 fp8"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_steps_that_run_are_built_before(name, tokens, interleaved, tiny, monkeypatch) -> None:
    """What the layers really ask their library for, on the CPU, is among what was planned."""
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr("bench.layer.cells.model", lambda name: tiny)
    mix, library = allocation(name), Recording()
    wanted = plan("w16a16", name, tokens=tokens, fusions=(FUSIONS["all" if interleaved else "overlap"],))
    cell, weights = wanted.cells[0], LayerWeights(tiny, "cpu")
    schemes = cell.schemes(mix)
    pair = (
        weights.experts(Linear.GATE_UP, schemes[Linear.GATE_UP], interleaved=interleaved),
        weights.experts(Linear.DOWN, schemes[Linear.DOWN]),
    )
    given = cell.given("cpu")
    layer = SteppedLayer(*pair, library, overlap=True)
    routing, x = layer.dispatch(given.hidden, given.ids)
    layer.product(torch.zeros(x.num_tokens, layer.first_columns, dtype=torch.bfloat16), routing)
    layer.steps.combine(torch.zeros(x.num_tokens, 64, dtype=torch.bfloat16), routing, given.weights)
    assert library.asked
    assert library.asked <= set(steps_needed(wanted))


def test_sets_keep_l2_cold() -> None:
    assert num_sets(touched_bytes=30, l2_bytes=50) == 5
    assert num_sets(touched_bytes=1000, l2_bytes=50) == 2


@pytest.fixture
def tiny() -> MoeShape:
    return MoeShape(
        name="tiny",
        hidden_size=64,
        intermediate_size=64,
        num_experts=6,
        top_k=2,
        num_shared_experts=0,
        shared_intermediate_size=0,
        num_moe_layers=1,
    )


def test_experts_are_entries_of_the_whole_stack(tiny) -> None:
    weights = LayerWeights(tiny, "cpu")
    names = [MIXED[0].middle, MIXED[0].high, MIXED[0].middle, BF16.middle, MIXED[0].high, BF16.middle]
    mixed = weights.experts(Linear.GATE_UP, names)
    assert mixed.scheme_of_expert == tuple(names)
    whole = weights.experts(Linear.GATE_UP, [BF16.middle] * 6)
    place = mixed.schemes.index(BF16.middle)
    assert torch.equal(mixed.stacks[place].blob, whole.stacks[0].blob[[3, 5]])


def test_the_reference_is_the_moe_of_the_real_weights(tiny) -> None:
    weights = LayerWeights(tiny, "cpu")
    ids = torch.tensor([[0, 5], [3, 1]])
    given = Given(
        hidden=torch.randn(2, 64).to(torch.bfloat16), ids=ids, weights=torch.tensor([[1.0, 0.0], [0.5, 2.0]]), counts=()
    )
    schemes = {Linear.GATE_UP: (MIXED[0].middle,) * 6, Linear.DOWN: (BF16.middle,) * 6}
    found = expected_output(weights, schemes, given)

    def expert(token: int, index: int) -> torch.Tensor:
        first = weights.real(Linear.GATE_UP, MIXED[0].middle, index)
        gate, up = (given.hidden[token].float() @ first.T).chunk(2)
        product = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16).float()
        return product @ weights.dense(Linear.DOWN, BF16.middle)[index].float().T

    assert torch.allclose(found[0], expert(0, 0), atol=1e-5)
    assert torch.allclose(found[1], 0.5 * expert(1, 3) + 2 * expert(1, 1), atol=1e-5)


def test_a_share_plans_its_own_experts_only(tiny) -> None:
    weights = LayerWeights(tiny, "cpu")
    mixed = weights.experts(Linear.DOWN, [BF16.middle, MIXED[0].middle] * 3)
    for index, experts in ((0, [0, 2, 4]), (1, [1, 3, 5])):
        share = SchemeShare(mixed, index)
        plan = share.bind(share.schemes).plan
        assert plan.tolist() == [[expert, 0, place, 0] for place, expert in enumerate(experts)]
        assert share.num_experts == 6
        assert share.scheme_of_expert == share.schemes * 3


def test_torchs_layer_is_the_moe(monkeypatch) -> None:
    def loop(x, weights, ends):
        out, start = torch.zeros(len(x), weights.shape[1], dtype=x.dtype), 0
        for expert, end in enumerate(ends.tolist()):
            out[start:end], start = x[start:end] @ weights[expert].T, end
        return out

    monkeypatch.setattr("bench.layer.layers.grouped_bf16", loop)
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(6, 32, 16, generator=generator), torch.randn(6, 16, 16, generator=generator)
    hidden, ids = torch.randn(5, 16, generator=generator), torch.randint(0, 6, (5, 2), generator=generator)
    weights = torch.rand(5, 2, generator=generator)
    expected = torch.zeros(5, 16)
    for token in range(5):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            gate, up = (hidden[token] @ gate_up[expert].T).chunk(2)
            expected[token] += weight * ((torch.nn.functional.silu(gate) * up) @ down[expert].T)
    found = torch_layer(hidden, ids, weights, gate_up, down)
    assert torch.allclose(found.float(), expected, atol=0.5, rtol=0.02)


def row(
    allocation_name: str, latency_us: float, *, variant=Variant.OURS, tokens=16, part="", status="ok", fusions="all"
):
    return {
        "model": CELL.model,
        "tokens": tokens,
        "seed": 0,
        "allocation": allocation_name,
        "group": allocation(allocation_name).group.value,
        "variant": variant.value,
        "part": part,
        "fusions": fusions if variant is Variant.OURS else "",
        "configs": "",
        "avg_bits": 4.25,
        "status": status,
        "error": "" if status == "ok" else "RuntimeError: no",
        "context_lost": False,
        "latency_us": latency_us,
        "least_us": latency_us,
        "most_us": latency_us,
        "num_samples": 30,
        "sm_clock_mhz": 1980.0,
        "reference_ratio": 1.0,
        "gpu": "h200",
        "versions": "{}",
        "timestamp": "2026-11-24T10:00:00+00:00",
    }


@pytest.fixture
def rows() -> pd.DataFrame:
    mix = MIXED[0].name
    return pd.DataFrame(
        [
            row(BF16.name, 200.0),
            row(BF16.name, 180.0, variant=Variant.TORCH_OUR_STEPS),
            row(mix, 50.0),
            row(mix, 62.5, fusions="four"),
            row(mix, 75.0, variant=Variant.PER_SCHEME),
            row(mix, 60.0, variant=Variant.STREAMS),
            row(mix, 55.0, part="without swiglu"),
            row(mix, 4.0, part="up to gather"),
            row(mix, 30.0, part="up to gemm 1"),
            row(mix, 29.0, part="up to swiglu"),  # no launch of its own, and noise
            row(BF16.name, float("nan"), variant=Variant.TORCH, status="failed"),
        ]
    )


def test_the_report_compares_with_the_fastest_bf16_layer(rows) -> None:
    whole = report.whole_layers(rows)
    mix = whole[(whole["allocation"] == MIXED[0].name) & (whole["variant"] == Variant.OURS.value)].iloc[0]
    assert mix["best_bf16"] == Variant.TORCH_OUR_STEPS.value
    assert mix["speedup"] == pytest.approx(3.6)
    split = report.against_split(whole).iloc[0]
    assert split["gain, a launch a scheme"] == pytest.approx(1.5)
    assert split["gain, a launch a scheme, on streams"] == pytest.approx(1.2)
    assert report.parts(rows).iloc[0][["gather", "gemm 1", "swiglu", "layer"]].tolist() == [4.0, 26.0, -1.0, 29.0]
    assert report.fusions(rows).iloc[0]["without swiglu"] == pytest.approx(1.1)
    assert report.choices(rows).iloc[-1]["all"] == pytest.approx(1.25)


def test_what_bounds_a_speed_up(rows) -> None:
    whole = report.whole_layers(rows)
    (found,) = report.against_limits(whole).to_dict("records")
    assert found["mix"] == MIXED[0].name
    assert found["speed-up"] == pytest.approx(3.6)
    bf16, mix = gemms_us(CELL, BF16), gemms_us(CELL, MIXED[0])
    assert found["speed-up at the limits"] == pytest.approx(bf16 / mix)
    assert 3 < bf16 / mix < 4.5  # 16 bits over 4.25, but for activations and which experts have tokens
    active = sum(count > 0 for count in CELL.counts())
    assert bf16 == pytest.approx(active * 3 * 2048 * 1408 * 2 / 4689e3, rel=0.02)
    fp8, int8 = (gemms_us(Cell(model=CELL.model, tokens=8192), allocation(name)) for name in EIGHT)
    assert int8 / fp8 == pytest.approx(1505 / 1151, rel=1e-3)


EIGHT = ("w8a8_g-1_sym_e4m3", "w8a8_g-1_sym")


def test_the_command_reports_what_was_measured(rows, tmp_path, capsys) -> None:
    rows.to_parquet(tmp_path / "layer.parquet")
    assert main(["--out", str(tmp_path)]) == 0
    assert "3.60 to 3.60 times as fast" in capsys.readouterr().out
    text = (tmp_path / "layer.md").read_text()
    assert "50.0 (3.60)" in text
    assert "torch: RuntimeError: no" in text
    assert (tmp_path / "layer.png").stat().st_size > 1000


def test_mistakes_are_one_sentence(tmp_path, capsys) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "is not there: measure with --measure" in capsys.readouterr().err
    (tmp_path / "layer.parquet").write_text("no")
    assert main(["--out", str(tmp_path)]) == 2
    assert "not a readable file of measured layers" in capsys.readouterr().err
    pd.DataFrame({"model": [1]}).to_parquet(tmp_path / "layer.parquet")
    with pytest.raises(DataError, match="it lacks tokens"):
        read_measured(tmp_path / "layer.parquet")
    assert main(["--measure", "--allocations", "none", "--out", str(tmp_path)]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err or torch.cuda.is_available()
    assert main(["--build", "--allocations", "none"]) == 2
    assert "allocation 'none'" in capsys.readouterr().err
    assert main(["--build", "--fusions", "most"]) == 2
    assert "--fusions: unknown most; known are four, epilogue, overlap, both, all" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_measuring_needs_a_gpu(tmp_path, capsys) -> None:
    assert main(["--measure", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("--measure: torch sees no GPU")
