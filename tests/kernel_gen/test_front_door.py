"""What a launch refuses before anything runs, without a GPU: tensors that say they are on one, and a kernel that only
notes its calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses import FakeTensorMode  # noqa: E402

import kernel_gen  # noqa: E402
from costmodel.facts import BuildFacts  # noqa: E402
from kernel_gen import runtime, select  # noqa: E402
from kernel_gen.experts import Experts  # noqa: E402
from kernel_gen.formats import PackedWeights  # noqa: E402
from kernel_gen.kernels import KernelSpec  # noqa: E402
from kernel_gen.legality import estimated_facts  # noqa: E402
from kernel_gen.library import KernelLibrary, library_of  # noqa: E402
from kernel_gen.moe import Fusion, MoELayer, grouped_gemm  # noqa: E402
from kernel_gen.runtime import Activations, prepare_activations  # noqa: E402
from profiles import gpus, kernels, schemes  # noqa: E402
from profiles.errors import SpecError, UnsupportedError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

N, K, TOKENS, EXPERTS = 192, 256, 8, 3
W4, W8 = "w4a16_g128_sym", "w8a8_g-1_sym"
SMALL, LARGE = "wgmma_64x16_w4x1x1_s4_k1_at_o1", "wgmma_128x128_w8x1x1_s4_k1_at_o1"


@dataclasses.dataclass
class NotedBundle:
    """A bundle whose kernels note what they were called with."""

    gpu: gpus.GpuSpec
    kernels: list = dataclasses.field(default_factory=list)
    calls: list = dataclasses.field(default_factory=list)
    path: str = "noted"

    def add(self, config: str, *names: str, max_experts: int = 256) -> NotedBundle:
        slots = tuple(schemes.parse(name) for name in names)
        spec = KernelSpec(config=kernels.parse(config), schemes=slots, arch=self.gpu.arch, max_experts=max_experts)
        facts: BuildFacts = estimated_facts(spec.config, slots, self.gpu)
        self.kernels.append(SimpleNamespace(spec=spec, facts=facts))
        return self

    def function(self, kernel):
        return lambda *arguments: self.calls.append((kernel.spec, arguments))


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch):
    """A GPU that is none. Yields a place to say that a graph is captured."""
    state = SimpleNamespace(capturing=False)
    found = SimpleNamespace(major=9, minor=0, name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(select, "ranking", lambda gpu: select.Ranking.CORE)  # nothing has to be fitted first
    for cached in (runtime._gpu_of, library_of):
        cached.cache_clear()
    with FakeTensorMode():
        yield state
    for cached in (runtime._gpu_of, library_of):
        cached.cache_clear()


def experts_of(*names: str, n: int = N, k: int = K, experts: int = EXPERTS, device: str = "cuda") -> Experts:
    """Experts that take turns in these schemes."""
    stacks, members = [], []
    for index, name in enumerate(names):
        members.append(list(range(index, experts, len(names))))
        part = torch.empty(4, dtype=torch.int32, device=device)
        stacks.append(
            PackedWeights(
                scheme=schemes.parse(name), n=n, k=k, num_experts=len(members[-1]), blob=part, scale_strip=part,
                zero_strip=None, channel_scales=None,
            )
        )  # fmt: skip
    return Experts(stacks, members)


def offsets_like(experts: int = EXPERTS, **options):
    return torch.empty(experts + 1, **({"dtype": torch.int32, "device": "cuda"} | options))


def apart(size: int):
    """Offsets of which every second number of memory is one."""
    return torch.empty_strided((size,), (2,), dtype=torch.int32, device="cuda")


def turned():
    """An output whose columns are beside each other instead of its rows."""
    return torch.empty_strided((TOKENS, N), (1, TOKENS), dtype=torch.bfloat16, device="cuda")


def tokens(*shape: int, **options):
    return torch.empty(*(shape or (TOKENS, K)), **({"dtype": torch.bfloat16, "device": "cuda"} | options))


def bundle_of(*names: str, config: str = SMALL) -> NotedBundle:
    return NotedBundle(gpus.gpu("h200")).add(config, *names)


def launch(bundle: NotedBundle, x=None, experts=None, offsets=None, out=None):
    experts = experts_of(W4) if experts is None else experts
    return grouped_gemm(
        tokens() if x is None else x,
        experts,
        offsets_like() if offsets is None else offsets,
        out,
        library=KernelLibrary(bundle.gpu, bundle),
        check_offsets=False,
    )


def test_the_package_has_its_public_names() -> None:
    assert kernel_gen.grouped_gemm is grouped_gemm
    assert kernel_gen.MoELayer is MoELayer
    assert all(getattr(kernel_gen, name) is not None for name in kernel_gen.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        kernel_gen.nonesuch  # noqa: B018


def test_importing_the_package_needs_no_torch() -> None:
    code = "import kernel_gen, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_output_in_the_memory_of_the_tokens_is_refused() -> None:
    bundle, memory = bundle_of(W4), tokens(2 * TOKENS, K)
    x = memory.narrow(0, 0, TOKENS)
    with pytest.raises(SpecError, match="out: expected memory of its own, got some that x is read from"):
        launch(bundle, x=x, out=memory.as_strided((TOKENS, N), (N, 1), K))
    assert bundle.calls == []
    launch(bundle, x=x, out=memory.as_strided((TOKENS, N), (N, 1), TOKENS * K))
    assert len(bundle.calls) == 1


def test_what_fits_is_launched() -> None:
    bundle = bundle_of(W4)
    assert launch(bundle).shape == (TOKENS, N)
    ((_, arguments),) = bundle.calls
    assert arguments[-2] == K


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: {"x": tokens(dtype=torch.float16)}, r"x: expected bfloat16 \[T, 256\] on cuda:0, got torch.float16"),
        (lambda: {"x": tokens(TOKENS, K + 1)}, r"x: expected bfloat16 \[T, 256\] on cuda:0, got .* \[8, 257\]"),
        (lambda: {"x": tokens(K)}, r"x: expected bfloat16 \[T, 256\] on cuda:0, got .* \[256\]"),
        (lambda: {"x": tokens(device="cpu")}, r"x: expected .* on cuda:0, got .* on cpu"),
        (lambda: {"x": [[0.0]]}, r"x: expected .* got a list"),
        (lambda: {"offsets": offsets_like(dtype=torch.int64)}, r"offsets: expected contiguous int32 \[4\] .*int64"),
        (lambda: {"offsets": offsets_like(EXPERTS + 1)}, r"offsets: expected contiguous int32 \[4\] .* got .* \[5\]"),
        (lambda: {"offsets": offsets_like(device="cpu")}, r"offsets: expected .* on cuda:0, got .* on cpu"),
        (lambda: {"offsets": apart(EXPERTS + 1)}, r"offsets: .* got .* \[4\], strides \[2\],"),
        (lambda: {"offsets": [0, 3, 5, 8]}, r"offsets: expected .* got a list"),
        (lambda: {"out": tokens(TOKENS, N, dtype=torch.float32)}, r"out: expected .* got torch.float32"),
        (lambda: {"out": tokens(TOKENS + 1, N)}, r"out: expected .* \[8, 192\] on cuda:0, got .* \[9, 192\]"),
        (lambda: {"out": turned()}, r"out: expected contiguous.* got .*strides \[1, 8\]"),
        (lambda: {"out": tokens(TOKENS, N, device="cpu")}, r"out: expected .* got .* on cpu"),
        (lambda: {"experts": experts_of(W4, device="cpu")}, "experts: expected weights on a CUDA device, got cpu"),
        (lambda: {"experts": torch.empty(3)}, r"experts: expected kernel_gen.Experts, got torch.float32 \[3\] on cpu"),
        (lambda: {"experts": experts_of(W8)}, rf"experts: expected schemes .* bundle noted .*{W4}.*, got {W8}"),
        (lambda: {"experts": experts_of(W4, W8)}, rf"experts: expected schemes .* \({W4}\), got {W4}\+{W8}"),
        (lambda: {"experts": experts_of(W4, experts=600), "offsets": offsets_like(600)}, "got .* 1024 experts"),
    ],
)  # fmt: skip
def test_mistakes_name_the_argument_and_launch_nothing(given, message) -> None:
    bundle = bundle_of(W4)
    with pytest.raises(SpecError, match=message):
        launch(bundle, **given())
    assert bundle.calls == []


def test_activations_must_be_prepared_for_the_experts() -> None:
    bundle = bundle_of(W8)
    x = Activations(num_tokens=TOKENS, k=K, addresses=(16, 0, 0, 0, 0, 0, 0), tensors=(tokens(),))
    with pytest.raises(SpecError, match=f"x: not prepared for {W8}"):
        launch(bundle, x=x, experts=experts_of(W8))
    with pytest.raises(SpecError, match="x: expected K = 512 as the experts have, got 256"):
        launch(bundle, x=x, experts=experts_of(W8, k=512))
    assert bundle.calls == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0, 5, 3, 8], "[0, 5, 3, 8]"),
        ([1, 2, 3, 8], "[1, 2, 3, 8]"),
        ([0, 2, 4, 7], "[0, 2, 4, 7]"),
        ([0, 2, 4, 9], "[0, 2, 4, 9]"),
        ([0, 2, -1, 8], "[0, 2, -1, 8]"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "[0, 1, 2, 3, ..., 9]"),
    ],
)
def test_offsets_rise_from_0_to_the_number_of_tokens(values, said) -> None:
    from kernel_gen.moe import _check_offsets

    with pytest.raises(SpecError) as caught:
        _check_offsets(SimpleNamespace(tolist=lambda: values), TOKENS)
    assert str(caught.value) == f"offsets: expected numbers rising from 0 to 8, got {said}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda stacks: (None, [[0, 1]]),
            "stacks: expected a list of what kernel_gen.formats.pack gives, got a NoneType",
        ),
        (lambda stacks: ([torch.empty(2)], [[0, 1]]), "stacks: expected a list of what .* gives, got a list"),
        (lambda stacks: (stacks, None), "members: expected a list of experts for each stack, got None"),
        (lambda stacks: (stacks, [0]), r"members: expected a list of experts for each stack, got \[0\]"),
    ],
)
def test_experts_are_of_packed_stacks(change, message) -> None:
    with pytest.raises(SpecError, match=message):
        Experts(*change(experts_of(W4, experts=2).stacks))


@pytest.mark.parametrize("members", [[[0, 2]], [[0, 0]], [[1, 2]], [[0, -1]]])
def test_every_expert_has_weights(members) -> None:
    (stack,) = experts_of(W4, experts=2).stacks
    with pytest.raises(SpecError, match=r"members: expected each expert 0..1 exactly once, got"):
        Experts([stack], members)


def test_a_gpu_of_another_architecture_is_refused() -> None:
    bundle = NotedBundle(gpus.gpu("rtx4090")).add("mma_64x8_w4x1x1_s6_k1_at_o4", W4)
    message = r"library: expected kernels for the sm_90 of cuda:0 \(NVIDIA H200\), got them for sm_89"
    with pytest.raises(SpecError, match=message):
        launch(bundle)
    library = KernelLibrary(bundle.gpu, bundle)
    with pytest.raises(SpecError, match=message):
        MoELayer(experts_of(W4, n=2 * K, k=N), experts_of(W4, n=N, k=K), library=library)
    with pytest.raises(SpecError, match="bundle: expected kernels for sm_90a, got sm_89"):
        KernelLibrary(gpus.gpu("h200"), bundle)
    assert bundle.calls == []


def test_a_card_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library_of(0).gpu.name == "h200"
    library_of.cache_clear()
    other = SimpleNamespace(major=9, minor=0, name="NVIDIA GH200 480GB", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: other)
    with pytest.raises(
        UnsupportedError, match=r"kernels for NVIDIA GH200 480GB .* of its compute .*: h100, h200; pass a"
    ):
        library_of(0)


HIDDEN, INTERMEDIATE, TOP_K = 256, 96, 2


def layer_of(gate_up=None, down=None) -> MoELayer:
    bundle = bundle_of(W4)
    return MoELayer(
        experts_of(W4, n=2 * INTERMEDIATE, k=HIDDEN) if gate_up is None else gate_up,
        experts_of(W4, n=HIDDEN, k=INTERMEDIATE) if down is None else down,
        library=KernelLibrary(bundle.gpu, bundle),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: {"gate_up": torch.empty(3)}, r"gate_up: expected kernel_gen.Experts, got torch.float32 \[3\]"),
        (lambda: {"down": [None]}, "down: expected kernel_gen.Experts, got a list"),
        (lambda: {"down": experts_of(W4, n=HIDDEN, k=INTERMEDIATE, experts=4)}, "down: expected 3 experts .* got 4"),
        (lambda: {"down": experts_of(W4, n=HIDDEN, k=HIDDEN)}, r"down: expected \[E, 256, 96\] .* got \[E, 256, 256\]"),
        (
            lambda: {"down": experts_of(W4, n=HIDDEN, k=INTERMEDIATE, device="cpu")},
            "down: expected both on one CUDA device, got cuda:0 and cpu",
        ),
    ],
)
def test_a_layer_is_of_linears_that_fit(given, message) -> None:
    with pytest.raises(SpecError, match=message):
        layer_of(**given())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"library": "bundle"}, "library: expected kernel_gen.KernelLibrary, got a str"),
        ({"fusions": 3}, "fusions: expected kernel_gen.Fusion or None, got 3"),
        (
            {"fusions": Fusion.COMBINE},
            "fusions: expected none of .* from a bundle, which has GEMMs only, got .*COMBINE",
        ),
        ({"fusions": Fusion.ALL}, "fusions: expected none of .* from a bundle, which has GEMMs only"),
    ],
)
def test_a_layers_options_are_named(options, message) -> None:
    bundle = bundle_of(W4)
    gate_up, down = experts_of(W4, n=2 * INTERMEDIATE, k=HIDDEN), experts_of(W4, n=HIDDEN, k=INTERMEDIATE)
    with pytest.raises(SpecError, match=message):
        MoELayer(gate_up, down, **({"library": KernelLibrary(bundle.gpu, bundle)} | options))
    with pytest.raises(SpecError, match=r"library: expected kernel_gen.KernelLibrary, got a str"):
        grouped_gemm(tokens(), experts_of(W4), offsets_like(), library="bundle")


def test_more_experts_a_token_than_the_fused_steps_hold_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down = experts_of(W4, n=2 * INTERMEDIATE, k=HIDDEN), experts_of(W4, n=HIDDEN, k=INTERMEDIATE)
    library = KernelLibrary(gpus.gpu("h200"))
    monkeypatch.setattr(library, "step", lambda spec: pytest.fail(f"{spec} was launched"))
    layer = MoELayer(gate_up, down, library=library, fusions=Fusion.ROUTE | Fusion.COMBINE)
    ids = tokens(TOKENS, 33, dtype=torch.int64)
    with pytest.raises(SpecError, match=r"expert_ids: expected at most 32 experts a token, .* got 33; leave"):
        layer(tokens(TOKENS, HIDDEN), ids, tokens(TOKENS, 33, dtype=torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, i, w: (None, i, w), r"hidden: expected bfloat16 \[T, 256\] on cuda:0, got None"),
        (lambda h, i, w: (tokens(TOKENS, HIDDEN, dtype=torch.float32), i, w), "hidden: .* got torch.float32"),
        (lambda h, i, w: (tokens(TOKENS, HIDDEN + 8), i, w), r"hidden: .* got .* \[8, 264\]"),
        (lambda h, i, w: (tokens(TOKENS, HIDDEN, device="cpu"), i, w), "hidden: .* on cuda:0, got .* on cpu"),
        (lambda h, i, w: (h, [[0, 1]], w), r"expert_ids: expected integers \[8, top_k\] on cuda:0, got a list"),
        (lambda h, i, w: (h, w, w), "expert_ids: expected integers .* got torch.float32"),
        (lambda h, i, w: (h, tokens(TOKENS + 1, TOP_K, dtype=torch.int64), w), r"expert_ids: .* got .* \[9, 2\]"),
        (lambda h, i, w: (h, i, i), r"expert_weights: expected floats \[8, 2\] on cuda:0, got torch.int64"),
        (lambda h, i, w: (h, i, tokens(TOKENS, TOP_K + 1)), r"expert_weights: .* \[8, 2\] .* got .* \[8, 3\]"),
        (lambda h, i, w: (h, i, None), "expert_weights: expected floats .* got None"),
    ],
)
def test_a_layers_inputs_are_named(change, message) -> None:
    given = (
        tokens(TOKENS, HIDDEN),
        tokens(TOKENS, TOP_K, dtype=torch.int64),
        tokens(TOKENS, TOP_K, dtype=torch.float32),
    )
    layer = layer_of()
    with pytest.raises(SpecError, match=message):
        layer(*change(*given))
    assert layer.kernels.bundle.calls == []


def test_inside_a_capture_nothing_is_allocated(h200: SimpleNamespace) -> None:
    bundle, experts, out = bundle_of(W4), experts_of(W4), tokens(TOKENS, N)
    library = KernelLibrary(bundle.gpu, bundle)
    h200.capturing = True
    with pytest.raises(SpecError, match=r"out: expected a tensor inside a graph capture.* got None"):
        grouped_gemm(tokens(), experts, offsets_like(), library=library)
    with pytest.raises(SpecError, match="a graph capture cannot load it"):
        grouped_gemm(tokens(), experts, offsets_like(), out, library=library)
    h200.capturing = False
    grouped_gemm(tokens(), experts_of(W4), offsets_like(), out, library=library, check_offsets=False)
    bundle.calls.clear()
    h200.capturing = True
    with pytest.raises(SpecError, match="experts: expected them launched by this kernel before"):
        grouped_gemm(tokens(), experts, offsets_like(), out, library=library)
    assert bundle.calls == []
    h200.capturing = False
    grouped_gemm(tokens(), experts, offsets_like(), out, library=library, check_offsets=False)
    h200.capturing = True
    grouped_gemm(tokens(), experts, offsets_like(), out, library=library)
    assert len(bundle.calls) == 2


def test_inside_a_capture_activations_are_prepared_before(h200: SimpleNamespace) -> None:
    bundle, experts, out = bundle_of(W8), experts_of(W8), tokens(TOKENS, N)
    x = Activations(num_tokens=TOKENS, k=K, addresses=(0, 16, 16, 0, 0, 0, 0), tensors=(tokens(),))
    launch(bundle, x=x, experts=experts)
    library = KernelLibrary(bundle.gpu, bundle)
    library.best(experts, TOKENS)
    h200.capturing = True
    with pytest.raises(SpecError, match="x: expected activations of prepare_activations inside a graph capture"):
        grouped_gemm(tokens(), experts, offsets_like(), out, library=library)
    grouped_gemm(x, experts, offsets_like(), out, library=library)
    assert len(bundle.calls) == 2


def test_a_bundle_gives_the_best_of_the_kernels_that_it_has() -> None:
    """Not the best of all, which its build may have refused."""
    bundle = bundle_of(W4).add(LARGE, W4)
    library = KernelLibrary(bundle.gpu, bundle)
    assert library.best(experts_of(W4), 1).spec.config.name == SMALL
    assert library.best(experts_of(W4), 1 << 15).spec.config.name == LARGE


def test_a_kernel_of_more_slots_serves_and_one_of_fewer_is_preferred() -> None:
    bundle = bundle_of(W8, W4)
    assert [scheme.name for scheme in KernelLibrary(bundle.gpu, bundle).best(experts_of(W4), 8).spec.schemes] == [
        W8,
        W4,
    ]
    bundle.add(SMALL, W4)
    assert [scheme.name for scheme in KernelLibrary(bundle.gpu, bundle).best(experts_of(W4), 8).spec.schemes] == [W4]
    asked = KernelLibrary(bundle.gpu, bundle).kernel(kernels.parse(SMALL), (schemes.parse(W4), schemes.parse(W8)))
    assert [scheme.name for scheme in asked.spec.schemes] == [W8, W4]


@pytest.mark.parametrize(
    ("weights", "given", "message"),
    [
        ((64, 128), schemes.parse(W4), r"weights: expected a tensor of floats \[E, N, K\], .* got .* \[64, 128\] on"),
        ((0, 64, 128), schemes.parse(W4), r"weights: .* no size of them 0, got torch.float32 \[0, 64, 128\] on cpu"),
        ((2, 64, 128), None, "schemes: expected those of profiles.schemes.parse, got None"),
        ((2, 64, 128), W4, f"schemes: expected those of profiles.schemes.parse, got '{W4}'"),
        ((2, 64, 128), [W4, W4], f"schemes: expected those of profiles.schemes.parse, got '{W4}'"),
        ((2, 64, 128), [schemes.parse(W4)] * 3, "schemes: expected one, or one for each of 2 experts, got 3"),
    ],
)
def test_weights_and_schemes_are_checked_first(weights, given, message) -> None:
    with pytest.raises(SpecError, match=message):
        Experts.from_weights(torch.empty(weights), given)


def test_activations_are_bfloat16() -> None:
    with pytest.raises(SpecError, match=r"x: expected bfloat16 \[T, K\], got torch.float32 \[8, 256\] on cuda:0"):
        prepare_activations(tokens(dtype=torch.float32), [schemes.parse(W4)])
    for given in (W4, [W4], None, schemes.parse(W4)):
        with pytest.raises(SpecError, match=r"schemes: expected a list of what profiles.schemes.parse gives, got"):
            prepare_activations(tokens(), given)


def test_a_library_is_of_a_gpu_and_its_kernels_can_be() -> None:
    with pytest.raises(SpecError, match=r"gpu: expected what profiles.gpus.gpu gives, got 'h200'"):
        KernelLibrary("h200")
    with pytest.raises(SpecError, match=r"bundle: expected what kernel_gen.load_bundle gives, got 'folder'"):
        KernelLibrary(gpus.gpu("h200"), "folder")
    library, config = KernelLibrary(gpus.gpu("h200")), kernels.parse(SMALL)
    with pytest.raises(SpecError, match="kernel: a kernel has 1 to 4 schemes, got 0"):
        library.kernel(config, ())
    with pytest.raises(SpecError, match=r"kernel: max_experts is a power of two in 32..1024, got 5000"):
        library.kernel(config, (schemes.parse(W4),), 5000)
