"""Ours against the peers: the roofline, recorded launches, mixed ones, and the command."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.peers import published
from bench.peers.__main__ import main
from bench.peers.mixed import compare_mixed, parts_of
from bench.peers.published import Peer, read_peers
from bench.peers.recorded import compare, means, read_launches, roofline_bar
from bench.peers.roofline import PeerClass, peer_class, roofline
from bench.peers.routing import Draw, draw_load
from profiles import kernels, loads, models
from profiles.errors import DataError, SpecError, UnsupportedError
from profiles.models import Linear
from profiles.records import ProfileRecord, Source, Status
from profiles.schemes import KERNEL_SCHEMES, parse
from profiles.store import ProfileStore

MODEL = "qwen1.5-moe-a2.7b"
N, K = models.model(MODEL).gemm(Linear.GATE_UP)
CONFIG = "wgmma_128x16_w4x1x1_s3_k1_at_o3"
OTHER = "wgmma_128x32_w4x1x1_s3_k1_at_o3"


def record(schemes: Sequence[str], latency_us: float | None, tokens: int = 16, **changes: Any) -> ProfileRecord:
    fields: dict[str, Any] = {
        "gpu": "h200",
        "model": MODEL,
        "linear": "gate_up",
        "n": N,
        "k": K,
        "load": loads.log_normal(60, tokens, 4),
        "schemes": tuple(map(parse, schemes)),
        "config": kernels.parse(CONFIG),
        "status": Status.OK,
        "source": Source.MEASURED,
        "latency_us": latency_us,
        "num_samples": 20,
    }
    return ProfileRecord(**{**fields, **changes})


def profile(path: Path, records: Sequence[ProfileRecord]) -> Path:
    with ProfileStore(path) as store:
        for one in records:
            store.append(one)
    return path


def test_the_roofline_counts_active_experts_once_and_no_padding() -> None:
    found = roofline(parse("w4a16_g128_sym"), 100, 256, (3, 0, 1))
    assert found.min_bytes == 2 * (100 * 256 / 2 + 100 * 2 * 2) + 4 * (2 * 256 + 2 * 100)
    assert found.flops == 2 * 4 * 100 * 256
    assert found.is_memory_bound
    assert found.us == found.min_bytes / 4689e3
    many = roofline(parse("w8a8_g-1_sym"), 4096, 4096, (8192,))
    assert many.us == pytest.approx(2 * 8192 * 4096 * 4096 / 1151e6)
    assert many.min_bytes == 4096 * (4096 + 4) + 8192 * (4096 + 4 + 2 * 4096)
    with pytest.raises(UnsupportedError, match="INT4"):
        roofline(parse("w4a4_g-1_sym"), 64, 64, (1,))


def test_published_fractions_are_fractions_of_this_roofline() -> None:
    """Where operations bound a launch the load does not matter, so that the peers' own numbers show the definition."""
    checked = 0
    scheme_of = {peer_class(scheme): scheme for scheme in KERNEL_SCHEMES}
    for (name, linear, tokens, group), peer in read_peers().items():
        shape = models.model(name)
        n, k = shape.gemm(Linear(linear))
        limit = roofline(
            scheme_of[group], n, k, loads.uniform(shape.num_experts, tokens, shape.top_k).tokens_per_expert
        )
        if not limit.is_memory_bound:
            assert limit.us / peer.latency_us == pytest.approx(peer.fraction, abs=0.0065), (name, linear, tokens, group)
            checked += 1
    assert checked >= 40


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES, ids=lambda scheme: scheme.name)
def test_every_scheme_has_its_class(scheme: Any) -> None:
    group = peer_class(scheme)
    if scheme.weight_bits == 3 or scheme.activation_bits == 4:
        assert group is None
    elif scheme.weight_bits == 16:
        assert group is PeerClass.BF16
    else:
        assert group is not None
        kind = "" if scheme.activation_bits == 16 else ("-fp8" if scheme.name.endswith("e4m3") else "-int8")
        assert group.value == f"w{scheme.weight_bits}a{scheme.activation_bits}{kind}"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("m,down,16,bf16,10,1.5,x", "1.5 of the roofline"),
        ("m,down,16,w9a9,10,0.5,x", "row 1"),
        ("m,down,16,bf16,10,0.5,x\nm,down,16,bf16,9,0.5,y", "row 2 repeats m down 16 bf16"),
    ],
)
def test_a_table_of_peers_with_a_mistake_is_refused(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "peers.csv"
    path.write_text(f"# made up\n{','.join(published.COLUMNS)}\n{row}\n")
    with pytest.raises(DataError, match=said):
        read_peers(path)


def test_the_fastest_measured_launch_is_compared(tmp_path: Path) -> None:
    path = profile(
        tmp_path / "p.parquet",
        [
            record(["w16a16"], 120.0),
            record(["w16a16"], 100.0, config=kernels.parse(OTHER)),
            record(["w16a16"], 10.0, source=Source.PREDICTED, num_samples=0),
            record(["w16a16"], None, status=Status.WRONG, error="off", num_samples=0, kernel_fingerprint="x"),
            record(["w3a16_g128_sym"], 50.0),
        ],
    )
    compared = compare(
        read_launches([path]), {(MODEL, "gate_up", 16, PeerClass.BF16): Peer(name="p", latency_us=1, fraction=0.8)}
    ).set_index("scheme")
    row = compared.loc["w16a16"]
    limit = roofline(parse("w16a16"), N, K, loads.log_normal(60, 16, 4).tokens_per_expert).us
    assert (row["config"], row["latency_us"], row["tokens"]) == (OTHER, 100.0, 16)
    assert row["fraction"] == pytest.approx(limit / 100)
    assert row["ratio"] == pytest.approx(limit / 100 / 0.8)
    assert row["ratio_with_floor"] == pytest.approx(limit / 104.8 / 0.8)
    assert math.isnan(compared.loc["w3a16_g128_sym", "ratio"])
    total = means(compared.reset_index(), "scheme").set_index("scheme").loc["all"]
    assert (total["rows"], total["mean_ratio"]) == (1, pytest.approx(row["ratio"]))


def test_bars_are_those_of_memory_and_of_operations() -> None:
    def bar(scheme: str, counts: tuple[int, ...], tokens: int, n: int = 1024) -> float:
        return roofline_bar(roofline(parse(scheme), n, 4096, counts), tokens)

    assert bar("w16a16", (4096,), 4096) == 0.85
    assert bar("w16a16", (1,), 16, n=65536) == 0.85
    assert bar("w16a16", (1,), 16) == 0.70
    assert math.isnan(bar("w16a16", (1,), 1))


def mix(counts: Sequence[int], first: str, second: str) -> list[str]:
    return [first if expert % 2 else second for expert in range(len(counts))]


def mixed_profile(path: Path, single_tokens: Sequence[int], mixed_us: Callable[[float], float]) -> pd.DataFrame:
    """Single launches at exactly half their roofline, and a mixed one whose time follows from its parts' rooflines."""
    first, second = "w16a16", "w4a16_g128_sym"
    load = loads.log_normal(60, 512, 4)
    assignment = mix(load.tokens_per_expert, first, second)
    parts = parts_of(assignment, load.tokens_per_expert)
    shares = sum(roofline(part.scheme, N, K, part.tokens_per_expert).us for part in parts)
    records = [record(assignment, mixed_us(shares), 512)]
    for scheme in (first, second):
        for tokens in single_tokens:
            counts = loads.log_normal(60, tokens, 4).tokens_per_expert
            records.append(record([scheme], 2 * roofline(parse(scheme), N, K, counts).us, tokens))
    return compare_mixed(read_launches([profile(path, records)]))


@pytest.mark.parametrize(
    ("single_tokens", "how"),
    [((512,), "same load"), ((256, 1024), "neighbouring loads"), ((64, 512, 2048), "same load")],
)
def test_a_mixed_launch_is_held_against_its_parts(tmp_path: Path, single_tokens: tuple[int, ...], how: str) -> None:
    (row,) = mixed_profile(tmp_path / "p.parquet", single_tokens, lambda shares: 2.2 * shares).to_dict("records")
    assert row["parts_recorded"] == how
    assert row["mix"] == "w16a16 + w4a16_g128_sym"
    assert row["roofline_share"] == pytest.approx(1 / 2.2)
    assert row["excess"] == row["excess_same_config"] == pytest.approx(0.1)
    assert row["speedup_free"] == pytest.approx(1 / 1.1)
    if how == "same load":
        assert row["sequential_us"] > row["parts_us"]  # each launch has its fixed cost


@pytest.mark.parametrize("single_tokens", [(256,), (16, 8192), (2048,)])
def test_nothing_is_derived_from_loads_far_away_or_on_one_side(tmp_path: Path, single_tokens: tuple[int, ...]) -> None:
    (row,) = mixed_profile(tmp_path / "p.parquet", single_tokens, lambda shares: 3 * shares).to_dict("records")
    assert row["parts_recorded"] == "no"
    assert math.isnan(row["excess"])
    assert math.isnan(row["speedup"])


def test_parts_leave_out_schemes_without_tokens() -> None:
    (part,) = parts_of(["w16a16", "w8a8_g-1_sym", "w16a16"], [3, 0, 2])
    assert (part.scheme.name, part.tokens_per_expert) == ("w16a16", (3, 0, 2))


def test_the_command_writes_tables_rows_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assignment = mix(range(60), "w16a16", "w2a16_g128_sym")
    path = profile(tmp_path / "p.parquet", [record(["w16a16"], 100.0), record(assignment, 90.0)])
    out = tmp_path / "new" / "out"
    assert main([str(path), "--out", str(out)]) == 0
    text = (out / "recorded.md").read_text()
    assert "1 of 1 rows are below 1" in text or "0 of 1 rows are below 1" in text
    assert "w16a16 + w2a16_g128_sym" in text
    assert "Peers' cells for which we recorded nothing (191 of 192)" in text
    assert len(pd.read_parquet(out / "recorded.parquet")) == len(pd.read_parquet(out / "mixed.parquet")) == 1
    assert (out / "recorded.png").read_bytes().startswith(b"\x89PNG")
    assert "Geometric means by scheme" in capsys.readouterr().out


def test_a_profile_of_few_launches_is_enough(tmp_path: Path) -> None:
    only = profile(tmp_path / "single.parquet", [record(["w3a16_g128_sym"], 100.0)])
    assert main([str(only), "--out", str(tmp_path)]) == 0
    assert "None were recorded." in (tmp_path / "recorded.md").read_text()


def test_mixed_launches_alone_are_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = profile(tmp_path / "mixed.parquet", [record(mix(range(60), "w16a16", "w8a8_g-1_sym"), 90.0)])
    assert main([str(only), "--out", str(tmp_path)]) == 2
    assert "no launch of one scheme" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = profile(tmp_path / "p.parquet", [record(["w16a16"], 100.0)])
    assert main([str(path), "--out", str(path)]) == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.parquet"], "none.parquet: no such profile"),
        (["--measure", "--tokens", "16,x"], "--tokens 16,x"),
        (["--measure", "--draws", "zipf"], "--draws: unknown zipf"),
        (["--measure", "--schemes", "w5a5"], "w5a5"),
        (["--measure", "--models", "nobody"], "nobody"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_another_card_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = profile(tmp_path / "p.parquet", [record(["w16a16"], 9.0, gpu="rtx4090")])
    assert main([str(path)]) == 2
    assert "rtx4090" in capsys.readouterr().err


def test_draws_are_reproducible_and_as_the_peers() -> None:
    load = draw_load(Draw.PEERS, 60, 512, 4, seed=3)
    assert load == draw_load(Draw.PEERS, 60, 512, 4, seed=3)
    assert load != draw_load(Draw.PEERS, 60, 512, 4, seed=4)
    assert load.total == 2048
    large = draw_load(Draw.PEERS, 4096, 1 << 16, 64)  # the spread of exp(0.7 normal) is sqrt(exp(0.49) - 1) = 0.795
    assert large.spread == pytest.approx(0.795, abs=0.06)
    assert draw_load(Draw.UNIFORM, 60, 512, 4).max - min(draw_load(Draw.UNIFORM, 60, 512, 4).tokens_per_expert) == 1
    with pytest.raises(SpecError, match="top 61"):
        draw_load(Draw.PEERS, 60, 512, 61)


def test_what_is_read_by_default_comes_with_the_package() -> None:
    """A measured run reads it too, to know what won before."""
    from bench.peers.__main__ import RECORDED

    root = Path(__file__).parents[2]
    assert [path for path in RECORDED if not (root / path).is_file()] == []
