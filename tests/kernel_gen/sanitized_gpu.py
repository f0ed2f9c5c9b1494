"""Small launches of every scheme for compute-sanitizer (tests/run_sanitizer.py): each kernel once, on a ragged load
with sizes off the tile. Without the sanitizer test_kernels_gpu.py has the same launches, so that pytest finds these by
name only.
"""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cutlass")

from tests.kernel_gen.gpu_cases import Case, kernel_for, run  # noqa: E402
from tests.kernel_gen.test_kernels_gpu import DECODE, MIDDLE, MIXED, SHORT_GROUPS, SINGLE, SPLITS, WGMMA_CONFIGS, WIDE  # noqa: E402

pytestmark = pytest.mark.gpu

LOAD = (3, 0, 17, 1, 40, 0, 5)
EIGHT_TOKENS = "wgmma_128x8_w4x1x1_s5_k1_at_o2"
TAILS_OF_EIGHT = "wgmma_256x16_w8x1x1_s3_k1_at_o1_t8"
OTHER_TILES = (MIDDLE, WGMMA_CONFIGS[0], WGMMA_CONFIGS[2], EIGHT_TOKENS, TAILS_OF_EIGHT, *SPLITS)
WATCHED = [(config, (name,)) for config, name in SINGLE if config in (DECODE, WGMMA_CONFIGS[1])]
WATCHED += [(config, (name,)) for config, name in SINGLE if config in OTHER_TILES and ("128" in name or "a8" in name)]
WATCHED += [(config, (name,)) for config, name in SHORT_GROUPS if config in (EIGHT_TOKENS, TAILS_OF_EIGHT)]
WATCHED += [(config, names) for config, names in MIXED if config in (DECODE, WGMMA_CONFIGS[1], EIGHT_TOKENS)]
WATCHED += [(config, names) for config, names in WIDE if len(names) > 1]


@pytest.mark.parametrize(
    ("config", "names"), WATCHED, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_a_small_launch(config: str, names: tuple[str, ...], record_property) -> None:
    kernel = kernel_for(config, names)
    record_property("kernel", f"{kernel.spec.label} {kernel.spec.fingerprint()}")
    schemes = tuple(names[i % len(names)] for i in range(len(LOAD)))
    assert run(kernel, Case(n=200, k=328, counts=LOAD, scheme_names=schemes)) is None


@pytest.mark.parametrize(
    ("names", "tokens", "hidden"),
    [
        (("w16a16",), 5, 72),
        (("w16a16", "w8a8_g-1_sym", "w8a8_g-1_sym_e4m3"), 33, 250),
        (("w4a4_g128_sym", "w8a8_g-1_sym"), 700, 200),
    ],
    ids=["steps_few", "steps_odd", "steps_many"],
)
def test_a_small_layers_steps(names, tokens: int, hidden: int, record_property) -> None:
    from tests.kernel_gen.test_moe_steps_gpu import draw_ids, steps_of

    record_property("kernel", f"steps {'+'.join(names)}")
    steps, *_ = steps_of(names, hidden=hidden, intermediate=hidden)
    ids = draw_ids("some out of range", tokens, 6, 12)
    x = torch.ones(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    routing = None if tokens < 100 else steps.route(ids)
    routing, _ = steps.gather(x, ids, routing, for_swiglu=True)
    steps.swiglu(torch.ones(tokens * 6, 2 * hidden, dtype=torch.bfloat16, device="cuda"), routing)
    y = torch.ones(tokens * 6, hidden, dtype=torch.bfloat16, device="cuda")
    out = steps.combine(y, routing, torch.ones(tokens, 6, device="cuda"))
    known = ((ids >= 0) & (ids < 12)).sum(1)
    assert torch.equal(out, known[:, None].expand(-1, hidden).to(torch.bfloat16))


@pytest.mark.parametrize("num_blocks", [9], ids=["control_9_blocks"])
def test_the_control_is_right(num_blocks: int, record_property) -> None:
    """What the sanitizer says of the wgmma family is judged by what it says of this."""
    from tests.kernel_gen.bulk_pipeline import WORDS, compiled

    record_property("kernel", "bulk_pipeline control")
    x = torch.arange(num_blocks * WORDS, dtype=torch.int32, device="cuda").view(num_blocks, WORDS)
    y = torch.zeros(WORDS, dtype=torch.int32, device="cuda")
    compiled()(x, y)
    assert torch.equal(y, x.sum(0, dtype=torch.int32))
