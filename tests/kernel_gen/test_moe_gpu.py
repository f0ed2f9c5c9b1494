"""The whole layer against a float32 MoE in torch, in a graph, under torch.compile, and with mistakes."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cutlass")

from kernel_gen.experts import Experts  # noqa: E402
from kernel_gen.formats import dequantize, quantize  # noqa: E402
from kernel_gen.moe import Fusion, MoELayer, grouped_gemm  # noqa: E402
from profiles import schemes  # noqa: E402
from profiles.errors import SpecError  # noqa: E402

pytestmark = pytest.mark.gpu

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 12, 256, 192, 3
MIXES = (
    ("w16a16",),
    ("w4a16_g128_asym",),
    ("w4a16_g128_sym", "w8a16_g-1_sym", "w2a16_g128_asym"),
    ("w8a8_g-1_sym_e4m3", "w4a16_g-1_sym"),
)


def every_fusion(intermediate: int) -> Fusion:
    """All that these sizes and this GPU allow."""
    aligned = Fusion.ALL if intermediate % 8 == 0 else Fusion.ALL & ~Fusion.EPILOGUE
    later = Fusion.OVERLAP | Fusion.PREFETCH
    return aligned if torch.cuda.get_device_capability()[0] >= 9 else aligned & ~later


def layer_of(names: tuple[str, ...], *, fusions=None, hidden=HIDDEN, intermediate=INTERMEDIATE):
    """(layer, the weights it really has in float32). fusions: all that are possible by default."""
    every = every_fusion(intermediate)
    fusions = every if fusions is None else fusions & every
    generator = torch.Generator("cuda").manual_seed(0)
    per_expert = [schemes.parse(names[e % len(names)]) for e in range(EXPERTS)]
    shapes = ((EXPERTS, 2 * intermediate, hidden), (EXPERTS, hidden, intermediate))
    weights = [torch.randn(shape, generator=generator, device="cuda") / shape[2] ** 0.5 for shape in shapes]
    real = [
        torch.stack([dequantize(quantize(w[e], scheme))[0] for e, scheme in enumerate(per_expert)]) for w in weights
    ]
    return MoELayer(*(Experts.from_weights(w, per_expert) for w in weights), fusions=fusions), real


def inputs(tokens: int, seed: int = 1, *, hidden=HIDDEN, top_k=TOP_K):
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(tokens, hidden, generator=generator, device="cuda").to(torch.bfloat16)
    weights, ids = torch.randn(tokens, EXPERTS, generator=generator, device="cuda").softmax(-1).topk(top_k)
    return values, ids, weights


def reference(real, hidden, ids, weights):
    """Float32, expert by expert."""
    gate_up, down = real
    out = torch.zeros(hidden.shape, device="cuda")
    for expert in range(EXPERTS):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[token].float() @ gate_up[expert].T).chunk(2, dim=1)
        y = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        out.index_add_(0, token, y * weights[token, slot, None].float())
    return out


def relative_error(found, expected) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("names", MIXES)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_the_layer_is_the_moe_of_its_quantised_weights(names, tokens) -> None:
    layer, real = layer_of(names)
    hidden, ids, weights = inputs(tokens)
    # bf16 between the linears costs 2^-8 a value; e4m3 activations 2^-4 each, halved by averaging over K, twice.
    limit = 0.05 if any("e4m3" in name for name in names) else 0.01
    assert relative_error(layer(hidden, ids, weights), reference(real, hidden, ids, weights)) < limit


EPILOGUE, PREFETCH = Fusion.SWIGLU | Fusion.EPILOGUE, Fusion.OVERLAP | Fusion.PREFETCH
NEEDS = {Fusion.EPILOGUE: EPILOGUE, Fusion.PREFETCH: PREFETCH}
NEEDED_BY = {Fusion.SWIGLU: EPILOGUE, Fusion.OVERLAP: PREFETCH}
SUBSETS = [
    Fusion.MEASURED_FASTER,
    *(NEEDS.get(one, one) for one in Fusion),
    *(Fusion.ALL & ~NEEDED_BY.get(one, one) for one in Fusion),
    Fusion.NONE,
]


@pytest.mark.parametrize("fusions", SUBSETS, ids=str)
@pytest.mark.parametrize("tokens", [5, 1500])
def test_each_fusion_can_be_left_out(fusions, tokens) -> None:
    names = ("w4a16_g128_sym", "w8a8_g-1_sym_e4m3", "w8a8_g-1_sym")
    layer, real = layer_of(names, fusions=fusions)
    given = inputs(tokens)
    out = layer(*given)
    assert relative_error(out, reference(real, *given)) < 0.05
    # swiglu rounds once where torch rounds twice: a last bit of bf16, which moves some 8-bit codes by one.
    assert relative_error(out, layer_of(names)[0](*given).float()) < 0.02


def test_what_was_measured_faster_is_the_default() -> None:
    experts = Experts.from_weights(torch.zeros(1, 64, 64, device="cuda"), schemes.parse("w16a16"))
    down = Experts.from_weights(torch.zeros(1, 64, 32, device="cuda"), schemes.parse("w16a16"))
    assert MoELayer(experts, down).fusions == every_fusion(32)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_any_number_of_choices(top_k) -> None:
    layer, real = layer_of(("w16a16", "w8a8_g-1_sym"))
    given = inputs(33, top_k=top_k)
    assert relative_error(layer(*given), reference(real, *given)) < 0.02


@pytest.mark.parametrize(("hidden", "intermediate"), [(250, 192), (256, 190), (250, 190)])
@pytest.mark.parametrize("fusions", [None, Fusion.NONE], ids=str)
def test_sizes_off_every_alignment(hidden, intermediate, fusions) -> None:
    layer, real = layer_of(("w16a16", "w8a8_g-1_sym"), fusions=fusions, hidden=hidden, intermediate=intermediate)
    given = inputs(33, hidden=hidden)
    out = layer(*given)
    assert out.shape == (33, hidden)
    assert relative_error(out, reference(real, *given)) < 0.02


@pytest.mark.parametrize("tokens", [3, 700, 2000])
def test_one_expert_may_get_every_token(tokens) -> None:
    layer, real = layer_of(("w4a16_g128_sym", "w8a8_g-1_sym"))
    hidden, ids, weights = inputs(tokens)
    ids = torch.full_like(ids, 7)
    ids[:, 1:] = -1
    assert relative_error(layer(hidden, ids, weights), reference(real, hidden, ids, weights)) < 0.02


@pytest.mark.parametrize("fusions", [None, Fusion.NONE], ids=str)
@pytest.mark.parametrize("tokens", [40, 2000])
def test_experts_of_other_ranks_add_nothing(fusions, tokens) -> None:
    layer, real = layer_of(("w4a16_g128_sym", "w16a16"), fusions=fusions)
    hidden, ids, weights = inputs(tokens)
    weights[ids >= 6] = torch.nan
    ids = torch.where(ids < 6, ids, ids + 1000)
    known = torch.where(ids < 6, weights, 0.0)
    assert relative_error(layer(hidden, ids, weights), reference(real, hidden, ids, known)) < 0.01
    assert not layer(hidden, ids + 1000, weights).any()


@pytest.mark.parametrize("tokens", [1, 64, 2000])
def test_repeats_give_the_same_bits(tokens) -> None:
    layer, _ = layer_of(("w4a16_g128_sym", "w8a8_g-1_sym_e4m3"))
    given = inputs(tokens)
    first = layer(*given)
    assert all(torch.equal(layer(*given), first) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16])
def test_other_types_of_ids_and_weights(dtype, weights_dtype) -> None:
    layer, _ = layer_of(("w4a16_g128_sym",))
    hidden, ids, weights = inputs(12)
    found = layer(hidden, ids.to(dtype), weights.to(weights_dtype))
    assert torch.equal(found, layer(hidden, ids, weights.to(weights_dtype).float()))


@pytest.mark.parametrize("tokens", [64, 2000])
def test_a_graph_replays_with_other_routing(tokens) -> None:
    layer, real = layer_of(("w4a16_g128_sym", "w8a16_g-1_sym"))
    hidden, ids, weights = inputs(tokens)
    layer(hidden, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(hidden, ids, weights)
    for seed in (5, 6):
        for held, new in zip((hidden, ids, weights), inputs(tokens, seed), strict=True):
            held.copy_(new)
        graph.replay()
        assert relative_error(out, reference(real, hidden, ids, weights)) < 0.01


def test_torch_compile_gives_the_same() -> None:
    layer, _ = layer_of(("w4a16_g128_sym",))
    hidden, ids, weights = inputs(20)
    step = torch.compile(lambda h: layer(h * 2, ids, weights) + 1, backend="eager")
    assert torch.equal(step(hidden), layer(hidden * 2, ids, weights) + 1)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_before_the_first_run_is_refused() -> None:
    layer, _ = layer_of(("w4a16_g128_sym", "w2a16_g128_asym"), hidden=384)
    given = inputs(3, hidden=384, top_k=2)
    with pytest.raises(SpecError, match="a graph capture cannot load it"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(*given)


@pytest.mark.parametrize("fusions", [None, Fusion.NONE], ids=str)
def test_no_tokens_give_no_rows(fusions) -> None:
    layer, _ = layer_of(("w4a16_g128_sym",), fusions=fusions)
    assert layer(*inputs(0)).shape == (0, HIDDEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, i, w: (h.float(), i, w), "hidden: expected bfloat16"),
        (lambda h, i, w: (h[:, :128], i, w), "hidden: expected bfloat16"),
        (lambda h, i, w: (h.cpu(), i, w), "hidden: expected"),
        (lambda h, i, w: (h, i[:3], w), "expert_ids: expected integers"),
        (lambda h, i, w: (h, i.cpu(), w), "expert_ids: expected integers"),
        (lambda h, i, w: (h, i > 3, w), "expert_ids: expected integers"),
        (lambda h, i, w: (h, i, w.cpu()), "expert_weights: expected floats"),
        (lambda h, i, w: (h, i, w[:, :1]), "expert_weights: expected floats"),
    ],
)
def test_mistakes_are_named(change, message) -> None:
    layer, _ = layer_of(("w4a16_g128_sym",))
    with pytest.raises(SpecError, match=message):
        layer(*change(*inputs(8)))


def test_interleaved_weights_are_the_epilogues() -> None:
    layer, _ = layer_of(("w4a16_g128_sym",))
    assert layer.gate_up.is_interleaved
    given = inputs(8)
    assert torch.equal(MoELayer(layer.gate_up, layer.down, fusions=layer.fusions)(*given), layer(*given))
    with pytest.raises(SpecError, match="gate_up: expected gate's rows before up's"):
        MoELayer(layer.gate_up, layer.down, fusions=Fusion.SWIGLU)
    with pytest.raises(SpecError, match="fusions: expected SWIGLU beside EPILOGUE"):
        MoELayer(layer.gate_up, layer.down, fusions=Fusion.EPILOGUE)
    with pytest.raises(SpecError, match="fusions: expected OVERLAP beside PREFETCH"):
        MoELayer(layer.gate_up, layer.down, fusions=Fusion.PREFETCH)


@pytest.mark.parametrize("bad", [[0, 5, 3, 8], [1, 2, 3, 8], [0, 2, 4, 7], [0, 2, 4, 9]])
def test_bad_offsets_are_refused(bad) -> None:
    experts = Experts.from_weights(torch.randn(3, 64, 128, device="cuda"), schemes.parse("w4a16_g128_sym"))
    x = torch.randn(8, 128, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(SpecError, match="offsets: expected numbers rising from 0 to 8"):
        grouped_gemm(x, experts, torch.tensor(bad, dtype=torch.int32, device="cuda"))
