"""A cell of whole layers measured on a device that is none: real weights, routing, choices and checks, on the CPU."""

import contextlib
from types import SimpleNamespace

import pandas as pd
import pytest

torch = pytest.importorskip("torch")

from bench.layer import building, measuring, ours, report  # noqa: E402
from bench.layer.allocations import allocation  # noqa: E402
from bench.layer.building import Plan  # noqa: E402
from bench.layer.cells import Cell  # noqa: E402
from bench.layer.contenders import FUSIONS, Variant  # noqa: E402
from bench.layer.layers import OneLaunch  # noqa: E402
from bench.layer.measuring import Device, measure, measure_cell, read_measured  # noqa: E402
from bench.layer.tuning import TunedLibrary  # noqa: E402
from bench.layer.weights import LayerWeights  # noqa: E402
from kernel_gen.experts import SWIGLU_ROWS  # noqa: E402
from kernel_gen.formats import dequantize, dequantize_activations, quantize_activations, unpack  # noqa: E402
from kernel_gen.layer import plain  # noqa: E402
from kernel_gen.measure import LaunchError  # noqa: E402
from kernel_gen.moe import Fusion  # noqa: E402
from kernel_gen.runtime import Activations  # noqa: E402
from kernel_gen.timing import Timing  # noqa: E402
from profiles.errors import UnsupportedError  # noqa: E402
from profiles.gpus import gpu  # noqa: E402
from profiles.models import MoeShape  # noqa: E402

TINY = MoeShape(
    name="tiny",
    hidden_size=128,
    intermediate_size=128,
    num_experts=8,
    top_k=2,
    num_shared_experts=0,
    shared_intermediate_size=0,
    num_moe_layers=1,
)
MIX = "w2a16/w4a8/w8a8 fp8"
H200 = gpu("h200")


def raw(rows):
    """Tokens as they are: the kernels below quantise them for each expert."""
    return Activations(num_tokens=len(rows), k=rows.shape[1], addresses=(0,) * 7, tensors=(rows,))


class CpuKernel:
    """A grouped GEMM of the experts' real weights, with what the spec's options do."""

    def __init__(self, spec):
        self.spec = spec

    def __call__(self, x, experts, offsets, out=None):
        experts.bind(self.spec.schemes)
        columns = experts.n // 2 if self.spec.swiglu else experts.n
        y = torch.zeros(x.num_tokens, columns, dtype=torch.bfloat16) if out is None else out
        for stack, members in zip(experts.stacks, experts.members, strict=True):
            floats = dequantize(unpack(stack))
            for entry, expert in enumerate(members):
                rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
                if rows.stop == rows.start:
                    continue
                tokens = dequantize_activations(quantize_activations(x.tensors[0][rows], stack.scheme))
                product = tokens @ floats[entry].T
                if self.spec.swiglu:
                    gate, up = product.view(len(tokens), -1, 2, SWIGLU_ROWS).unbind(2)
                    product = (torch.nn.functional.silu(gate) * up).flatten(1)
                y[rows] = product.to(torch.bfloat16)
        return y


class CpuLibrary(TunedLibrary):
    """Refuses configurations by name, to see that the others are tried."""

    def __init__(self):
        super().__init__(H200, SimpleNamespace(gpu=H200, path="nowhere", kernels=()))
        self.refused: set[str] = set()
        self.options: set[tuple[bool, bool]] = set()

    def _bundled(self, spec):
        if spec.config.name in self.refused:
            raise UnsupportedError(spec.label, ["refused"])
        self.options.add((spec.swiglu, spec.overlap))
        return CpuKernel(spec)


class CpuSteps:
    """kernel_gen.layer.fused.FusedSteps in torch."""

    def __init__(self, gate_up, down, library, *, overlap):
        self.num_experts = gate_up.num_experts

    def route(self, ids):
        return plain.route(ids, self.num_experts)

    def gather(self, hidden, ids, routing, *, for_swiglu):
        found = routing or self.route(ids)
        rows = torch.empty(ids.numel(), hidden.shape[1], dtype=hidden.dtype)
        rows[found.positions.flatten()] = hidden.repeat_interleave(ids.shape[1], 0)
        return found, raw(rows)

    def swiglu(self, gate_up, routing):
        gate, up = gate_up.chunk(2, dim=1)
        return raw(torch.nn.functional.silu(gate) * up)

    def quantize(self, product, routing):
        return raw(product)

    def combine(self, y, routing, weights):
        return plain.combine(y, routing, weights)


class CpuLayer(OneLaunch):
    """kernel_gen.moe.MoELayer."""

    def __init__(self, gate_up, down, *, library, fusions):
        assert gate_up.is_interleaved == (Fusion.EPILOGUE in fusions)
        overlap, prefetch = Fusion.OVERLAP in fusions, Fusion.PREFETCH in fusions
        super().__init__(gate_up, down, library, overlap=overlap, prefetch=prefetch)


class CpuClock:
    """Times that follow from the order of calls."""

    def __init__(self):
        self.calls = 0

    def time_launches(self, launches, rule):
        assert len(launches) > 1  # so that L2 is cold
        self.calls += 1
        median = 10.0 + self.calls
        return Timing(
            median_us=median, p20_us=median, p80_us=median, num_samples=5, sm_clock_mhz=1980.0, reference_ratio=1.0
        )

    def time_single(self, launch, samples):
        launch()
        return 1.0


@pytest.fixture
def one_thread():
    """Tensors are small: threads that wait for each other take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device(monkeypatch, one_thread) -> Device:
    def loop(x, weights, ends):
        out, start = torch.zeros(len(x), weights.shape[1], dtype=x.dtype), 0
        for expert, end in enumerate(ends.tolist()):
            out[start:end], start = x[start:end] @ weights[expert].T, end
        return out

    monkeypatch.setattr("bench.layer.cells.model", lambda name: TINY)
    monkeypatch.setattr("bench.layer.layers.FusedSteps", CpuSteps)
    monkeypatch.setattr("bench.layer.layers.grouped_bf16", loop)
    monkeypatch.setattr(ours, "MoELayer", CpuLayer)
    monkeypatch.setattr(measuring, "_streams", lambda: ())
    monkeypatch.setattr(measuring, "DEVICE", "cpu")
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "stream", lambda of: contextlib.nullcontext())
    return Device(
        gpu=H200,
        clock=CpuClock(),
        kernels=CpuLibrary(),
        l2_bytes=1 << 10,
        versions={"torch": "2"},
        failures=measuring.FAILURES,
    )


def plan(*tokens: int, fusions=("four", "all"), parts=False) -> Plan:
    return Plan(
        cells=tuple(Cell(model="tiny", tokens=each) for each in tokens),
        allocations=(allocation("w8a8_g-1_sym"), allocation(MIX)),
        gpu=H200,
        num_configs=3,
        fusions=tuple(FUSIONS[name] for name in fusions),
        with_parts=parts,
    )


def measured(device, wanted):
    found = measure_cell(wanted.cells[0], wanted, device, LayerWeights(TINY, "cpu"), rounds=2, compiled=False)
    return pd.DataFrame(found.rows)


@pytest.mark.parametrize("fusions", [("four", "all"), ("epilogue", "overlap")])
def test_every_layer_is_right_and_timed(device, fusions) -> None:
    rows = measured(device, plan(40, fusions=fusions))
    failed = rows[rows["status"] != "ok"]
    assert set(failed["variant"]) <= {Variant.TRITON_OUR_STEPS.value}, list(failed["error"])
    timed = rows[rows["status"] == "ok"]
    counts = timed.groupby(["allocation", "variant"]).size()
    assert counts[MIX].to_dict() == {
        Variant.OURS.value: 2,
        Variant.PER_SCHEME.value: 1,
        Variant.STREAMS.value: 1,
    }
    assert set(timed[timed["variant"] == Variant.OURS.value]["fusions"]) == set(fusions)
    assert {Variant.TORCH.value, Variant.TORCH_OUR_STEPS.value} <= set(timed["variant"])
    assert (timed["least_us"] < timed["most_us"]).all()
    assert len(device.kernels.options) > 1
    whole = report.whole_layers(rows)
    assert set(whole["fusions"]) == {"all" if "all" in fusions else fusions[0], ""}  # the default, where it was timed


def test_parts_and_each_fusion_left_out(device) -> None:
    rows = measured(device, plan(40, fusions=("all",), parts=True))
    assert set(rows[rows["allocation"] == MIX]["part"]) == {""}
    assert set(rows[rows["allocation"] == ours.PARTS_OF[0]]["part"]) == {
        "",
        *(f"up to {part}" for part in OneLaunch.PARTS),
        *(f"without {name}" for name in ("route", "gather", "combine", "epilogue", "prefetch")),
        "without swiglu and epilogue",
        "without overlap and prefetch",
    }


def test_a_refused_configuration_costs_only_itself(device) -> None:
    rows = measured(device, plan(40, fusions=("four",)))
    first = rows[(rows["allocation"] == MIX) & (rows["variant"] == Variant.OURS.value)]["configs"].iloc[0]
    again = CpuLibrary()
    again.refused = set(first.split(", "))
    device = Device(**{name: getattr(device, name) for name in Device.__slots__} | {"kernels": again})
    rows = measured(device, plan(40, fusions=("four",)))
    second = rows[(rows["allocation"] == MIX) & (rows["variant"] == Variant.OURS.value)]["configs"].iloc[0]
    assert not again.refused & set(second.split(", "))


def test_a_second_run_goes_on_and_a_lost_device_ends_one(device, tmp_path, monkeypatch) -> None:
    path, wanted = tmp_path / "layer.parquet", plan(4, 40, fusions=("four",))
    (first,) = measure(plan(4, fusions=("four",)), device, path, rounds=1, compiled=False)
    assert not first.context_lost

    def lost(launches, rule):
        raise LaunchError("an illegal memory access")

    monkeypatch.setattr(device.clock, "time_launches", lost)
    (second,) = measure(wanted, device, path, rounds=1, compiled=False)
    assert (second.cell.tokens, second.context_lost) == (40, True)
    assert set(read_measured(path)["tokens"]) == {4, 40}


def test_what_runs_is_what_was_planned(device) -> None:
    """Every kernel that the layers ask for is among those that --build compiles."""
    wanted = plan(40, fusions=("all", "four"), parts=True)
    measured(device, wanted)
    assert set(device.kernels._loaded) <= set(building.specs_needed(wanted))
