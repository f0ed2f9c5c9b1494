import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import SpecError
from profiles.kernels import Family, GemmShape, KernelConfig, Raster, TileShape, WarpLayout, parse
from tests.profiles.strategies import configs


@given(configs)
def test_a_name_is_read_back(config: KernelConfig) -> None:
    assert parse(config.name) == config
    assert str(config) == config.name


@given(st.text() | st.from_regex(r"mma_\d+x\d+_w\d+x\d+x\d+_s\d+_k\d+_a[tf]_o\d+", fullmatch=True))
def test_any_text_is_known_or_refused(text: str) -> None:
    try:
        name = parse(text).name
    except SpecError:
        return
    assert name == text


def test_a_name_says_everything() -> None:
    config = parse("mma_128x16_w8x1x2_s4_k3_af_o2")
    assert config == KernelConfig(
        family=Family.MMA,
        tile=TileShape(m=128, n=16),
        warps=WarpLayout(m=8, n=1, k=2),
        num_stages=4,
        split_k=3,
        raster=Raster.ALONG_FEATURES,
        min_ctas_per_sm=2,
    )
    assert config.num_threads == 512


def test_clusters_and_tails_are_named_where_they_are_used() -> None:
    plain = parse("wgmma_256x128_w8x1x1_s4_k1_at_o1")
    assert (plain.cluster, plain.tail) == (1, 0)
    both = parse("wgmma_256x128_w8x1x1_s4_k1_at_o1_c2_t32")
    assert (both.cluster, both.tail) == (2, 32)
    assert parse("wgmma_256x128_w8x1x1_s4_k1_at_o1_t32").tail == 32
    for name in ("_c1", "_t0", "_t32_c2", "_c02", "_c2_"):
        with pytest.raises(SpecError, match="unknown kernel configuration"):
            parse(plain.name + name)


@pytest.mark.parametrize(
    ("tail", "tokens", "widths"),
    [
        ("", 300, (128, 128, 128)),
        ("_t32", 300, (128, 128, 64)),
        ("_t32", 256, (128, 128)),
        ("_t64", 1, (64,)),
        ("", 0, ()),
    ],
)
def test_only_the_last_token_tile_is_narrower(tail: str, tokens: int, widths: tuple[int, ...]) -> None:
    assert parse("wgmma_256x128_w8x1x1_s4_k1_at_o1" + tail).token_tile_widths(tokens) == widths


@pytest.mark.parametrize(
    "name",
    ["mma_128x16_w8x1x1_s0_k1_at_o2", "mma_0128x16_w8x1x1_s4_k1_at_o2", "hmma_128x16_w8x1x1_s4_k1_at_o2", "", "mma"],
)
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="unknown kernel configuration"):
        parse(name)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match=r"tile\.k is 0, not 64"):
        KernelConfig(family=Family.MMA, tile=TileShape(m=64, n=8, k=64), warps=WarpLayout(m=4), num_stages=2)
    with pytest.raises(SpecError, match="stages 0"):
        KernelConfig(family=Family.MMA, tile=TileShape(m=64, n=8), warps=WarpLayout(m=4), num_stages=0)
    with pytest.raises(SpecError, match="tile 0x8x0"):
        TileShape(m=0, n=8)
    with pytest.raises(SpecError, match="warps 4x0x1"):
        WarpLayout(m=4, n=0)
    with pytest.raises(SpecError, match="problem -1x1x1"):
        GemmShape(m=-1, n=1, k=1)
