"""`--guided` as the real command, over devices that replay made-up latencies."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from costmodel.table import CostTable
from kernel_gen.sweep import main
from kernel_gen.sweeping import backends
from kernel_gen.sweeping.builds import Built
from kernel_gen.sweeping.candidates import Candidate
from kernel_gen.sweeping.isolation import WorkerPool
from profiles.places import committed_profiles
from profiles.records import Source, Status
from profiles.store import ProfileStore
from tests.kernel_gen.sweep.replay import ReplayBench, latency_us

SMALL = (
    "--gpu rtx4090 --model olmoe-1b-7b --tokens 1,64,1024 --schemes w16a16,w4a16_g128_sym,w8a8_g-1_sym"
    " --out p.parquet --guided --latency-model none --batch 8"
)


class CountingBench(ReplayBench):
    """Notes what is built, batch by batch, and that one pool serves all batches."""

    def __init__(self, folder: Path, behaviour: dict[str, str] | None = None) -> None:
        super().__init__(folder, behaviour or {})
        self.batches: list[list[Candidate]] = []
        self.pools = 0

    def build(self, candidates: Sequence[Candidate], *, live: bool) -> None:
        self.batches.append(list(candidates))

    def find(self, candidate: Candidate) -> Built | None:  # type: ignore[override]
        """As a machine's own bench: only what was built in this run."""
        kernel = candidate.config, candidate.workload.slots
        built = {(each.config, each.workload.slots) for batch in self.batches for each in batch}
        return super().find(candidate) if kernel in built else None

    def pool(self) -> WorkerPool:
        self.pools += 1
        pool = super().pool()
        assert isinstance(pool, WorkerPool)
        return pool


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], words: str, bench: ReplayBench) -> tuple[dict[str, object], str]:
    assert main([*words.split(), "--json"], bench=bench) == 0
    captured = capsys.readouterr()
    body = json.loads(captured.out)
    assert isinstance(body, dict)
    return body, captured.err


def test_few_candidates_are_measured_and_the_choices_are_nearly_the_best(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bench = CountingBench(tmp_path)
    body, err = run(capsys, f"{SMALL} --goal 0.01 --batch 4", bench)
    guided = body["guided"]
    assert isinstance(guided, dict)
    rows = ProfileStore(tmp_path / "p.parquet").records()
    assert guided["num_measured"] == len(rows) == sum(map(len, bench.batches))
    assert guided["num_measured"] < 0.4 * guided["num_candidates"]
    assert guided["expected_regret"] <= 0.01
    assert "the goal was 1%" in str(guided["why"])
    assert len(bench.batches) > 1
    assert bench.pools == 1
    assert all(0 < len(batch) <= 4 for batch in bench.batches)
    assert set(rows["source"]) == {Source.MEASURED.value}
    assert err.count("candidates measured") == len(bench.batches) + 1

    best = body["best"]
    assert isinstance(best, list)
    assert len(best) == 2 * 3 * 3
    assert {cell["source"] for cell in best} == {"measured", "predicted"}
    table = CostTable.read(tmp_path / "p.table.parquet", gpu="rtx4090").frame()
    assert len(table) == len(best)
    assert (table["std_us"] > 0).all()
    measured = table[table["source"] == "measured"]
    assert (measured["std_us"] / measured["latency_us"]).max() < 0.01
    assert set(measured["latency_us"].round(6)) <= set(rows["latency_us"].round(6))


def test_the_choice_is_by_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With everything allowed and no goal, it ends when the rest is hopeless; the choices are the fastest measured."""
    words = SMALL.replace("--tokens 1,64,1024", "--tokens 64").replace("w16a16,w4a16_g128_sym,", "")
    bench = CountingBench(tmp_path)
    body, _ = run(capsys, f"{words} --goal 0", bench)
    guided, best = body["guided"], body["best"]
    assert isinstance(guided, dict)
    assert isinstance(best, list)
    seen = [candidate for batch in bench.batches for candidate in batch]
    assert len(set(seen)) == len(seen) == guided["num_measured"] < guided["num_candidates"]
    assert "no measurement would help" in guided["why"]
    for cell in best:
        fastest = min(latency_us(each) for each in seen if each.workload.linear == cell["linear"])
        assert cell["latency_us"] == pytest.approx(fastest)


def test_the_same_command_continues(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, _ = run(capsys, f"{SMALL} --max-measurements 20 --goal 0", CountingBench(tmp_path))
    assert first["rows"]["new"] == first["guided"]["num_measured"] == 20  # type: ignore[index]
    assert "20 measurements were allowed" in first["guided"]["why"]  # type: ignore[index]
    again = CountingBench(tmp_path)
    second, _ = run(capsys, f"{SMALL} --max-measurements 20 --goal 0", again)
    assert again.batches == []
    assert again.pools == 0
    assert second["rows"] == {"new": 0, "ok": 20}
    for cell in [*first["best"], *second["best"]]:  # type: ignore[misc]
        assert cell.pop("is_built") or cell["source"] == "predicted"
    assert second["best"] == first["best"]
    more = CountingBench(tmp_path)
    third, _ = run(capsys, f"{SMALL} --max-measurements 30 --goal 0", more)
    assert third["rows"] == {"new": 10, "ok": 30}
    assert sum(map(len, more.batches)) == 10


def test_failures_are_rows_and_are_not_chosen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bench = CountingBench(tmp_path, {"3": "segfault", "5": "lose context", "9": "exit"})
    body, _ = run(capsys, f"{SMALL} --max-measurements 24 --goal 0", bench)
    rows = ProfileStore(tmp_path / "p.parquet").records()
    failed = rows[rows["status"] != Status.OK.value]
    assert len(rows) == 24
    assert len(failed) == 3
    chosen = {(c["linear"], c["scheme"], c["tokens"], c["config"]) for c in body["best"]}  # type: ignore[attr-defined]
    for _, row in failed.iterrows():
        tokens = int(np.sum(row["tokens_per_expert"]) // 8)
        assert (row["linear"], row["schemes"][0], tokens, row["config"]) not in chosen
    assert len(body["failures"]) == 3  # type: ignore[arg-type]


def test_time_is_a_limit_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    body, _ = run(capsys, f"{SMALL} --max-seconds 0.001 --goal 0", CountingBench(tmp_path))
    assert body["guided"]["num_measured"] == 8  # type: ignore[index]
    assert "0.001 s were allowed" in body["guided"]["why"]  # type: ignore[index]


def test_mixes_are_tuned_and_not_in_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = SMALL.replace("--schemes w16a16,w4a16_g128_sym,w8a8_g-1_sym", "--mixed w4a16_g128_sym+w8a8_g-1_sym")
    body, _ = run(capsys, f"{words} --max-measurements 16", CountingBench(tmp_path))
    assert {cell["scheme"] for cell in body["best"]} == {"w4a16_g128_sym:0.5+w8a8_g-1_sym:0.5"}  # type: ignore[attr-defined]
    assert body["guided"]["table"] is None  # type: ignore[index]
    assert not (tmp_path / "p.table.parquet").exists()


def test_the_closing_table_says_what_was_predicted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(f"{SMALL} --max-measurements 16".split(), bench=CountingBench(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "(predicted)" in out
    assert "guided: 16 of " in out
    assert "cost table: p.table.parquet" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--goal 0.1", "--goal is an option of --guided"),
        ("--max-seconds 3", "--max-seconds is an option of --guided"),
        ("--guided --goal 1.5", "--goal 1.5"),
        ("--guided --goal=-1", "--goal -1"),
        ("--guided --batch 0", "--batch 0"),
        ("--guided --max-measurements 0", "--max-measurements 0"),
        ("--guided --max-seconds nan", "--max-seconds nan"),
        ("--guided --ray auto", "leave out --ray"),
        ("--guided --backend predict", "leave out --backend predict"),
        ("--again p.parquet --model olmoe-1b-7b", "leave out --model"),
        ("--again p.parquet --guided", "leave out --guided"),
        ("--again p.parquet --launches 0", "--launches 0"),
        ("--launches 10", "only with --again"),
        ("--again p.parquet", "p.parquet: no such profile"),
        ("--guided", "--guided measures, but there is no h200 here (no NVIDIA GPU found)"),
    ],
)
def test_a_mistake_is_one_sentence_and_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.setattr(backends, "installed_gpus", lambda: ())
    assert main(["--gpu", "h200", *words.split()]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = SMALL.replace("--latency-model none", "--latency-model no.npz")
    assert main(words.split(), bench=CountingBench(tmp_path)) == 2
    assert "no.npz" in capsys.readouterr().err


def test_committed_profiles_are_found() -> None:

    assert all(path.suffix == ".parquet" for path in committed_profiles("h200"))
    assert committed_profiles("h200")
    assert committed_profiles("rtx4090") == []


def test_worth_measures_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a GPU, and without a bench."""
    words = SMALL.replace("--guided", "--worth --backend predict")
    assert main([*words.split(), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["num_launches"] == 18
    assert body["over_model"] is None
    assert 0 <= body["over_default"]["low"] < body["over_default"]["expected"] < body["over_default"]["high"] < 1
    assert 0 < body["guided"]["num_measurements"] <= body["exhaustive"]["num_measurements"] == body["num_candidates"]
    assert 0 < body["guided"]["seconds"] < body["exhaustive"]["seconds"]
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("olmoe-1b-7b on rtx4090, 18 launches")
    assert "minutes" in out
    assert not list(tmp_path.iterdir())


def test_recorded_launches_are_measured_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bench = CountingBench(tmp_path)
    words = SMALL.replace(" --guided --latency-model none --batch 8", " --mixed w4a16_g128_sym+w8a8_g-1_sym --tries 3")
    assert main(words.split(), bench=bench) == 0
    recorded = ProfileStore(tmp_path / "p.parquet").records()
    capsys.readouterr()
    again = CountingBench(tmp_path)
    body, _ = run(capsys, "--gpu rtx4090 --again p.parquet --launches 20 --out again.parquet", again)
    rows = ProfileStore(tmp_path / "again.parquet").records()
    assert len(rows) == 20 == sum(map(len, again.batches))
    columns = ["linear", "config", "load_source", "n", "k"]
    was = {tuple(row) for row in recorded[columns].itertuples(index=False)}
    assert {tuple(row) for row in rows[columns].itertuples(index=False)} <= was
    assert {len(set(used)) for used in rows["schemes"]} == {1, 2}
    assert {name for used in rows["schemes"] for name in used} == {"w16a16", "w4a16_g128_sym", "w8a8_g-1_sym"}
    assert body["rows"] == {"new": 20, "ok": 20}
    assert main(["--gpu", "h200", "--again", "p.parquet", "--out", "x.parquet"], bench=again) == 2
    assert "are of rtx4090, not h200" in capsys.readouterr().err
