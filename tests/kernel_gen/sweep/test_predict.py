"""The predict backend: real build facts where they decide, estimates elsewhere, and every row says which."""

import json
from pathlib import Path

import numpy as np
import pytest

from costmodel.analytic import launch_latency
from kernel_gen.build import silent
from kernel_gen.bundle import write_bundle
from kernel_gen.cache import KernelCache
from kernel_gen.legality import estimated_facts
from kernel_gen.space import Effort
from kernel_gen.sweep import main
from kernel_gen.sweeping.backends import Choice, sweep
from kernel_gen.sweeping.builds import Built, can_compile, compiled, compiled_and_gated
from kernel_gen.sweeping.candidates import Measurement
from kernel_gen.sweeping.plan import Mix, SweepRequest, plan
from kernel_gen.sweeping.predict import BUILDS_PER_KERNEL, KEPT_PER_CELL, least_regret, predict, wanted_builds
from profiles import schemes
from profiles.errors import SpecError
from profiles.gpus import gpu
from profiles.kernels import GemmShape
from profiles.models import model
from profiles.records import Source, Status
from profiles.store import ProfileStore

needs_compiler = pytest.mark.skipif(not can_compile(), reason="needs the compile extra")


def request(out: Path, *names: str, tokens: tuple[int, ...] = (1, 256)) -> SweepRequest:
    return SweepRequest(
        gpu=gpu("rtx4090"),
        models=(model("olmoe-1b-7b"),),
        linears=("gate_up", "down"),
        tokens=tokens,
        loads=("uniform",),
        seed=0,
        schemes=tuple(schemes.parse(name) for name in names),
        mixes=(),
        effort=Effort.QUICK,
        out=out,
    )


def test_estimated_rows_are_the_analytic_model_over_estimates(tmp_path: Path) -> None:
    asked = request(tmp_path / "p.parquet", "w4a16_g128_sym", "w8a8_g-1_sym")
    cells = plan(asked)
    assert len(cells) == 2 * 2 * 2
    rows = list(predict(asked, cells, {}))
    assert len(rows) == len(cells) * KEPT_PER_CELL
    for row in rows[:: KEPT_PER_CELL - 1]:
        facts = estimated_facts(row.config, row.schemes, asked.gpu)
        shape = GemmShape(m=row.load.total, n=row.n, k=row.k)
        expected = launch_latency(asked.gpu, shape, row.load, row.schemes, row.config, facts)
        assert row.latency_us == pytest.approx(expected.latency_us)
        assert (row.source, row.kernel_fingerprint, row.num_samples) == (Source.PREDICTED, "", 0)
        assert row.key == next(
            candidate.key(gpu="rtx4090", source=Source.PREDICTED, kernel_fingerprint="")
            for cell in cells
            if (cell.workload.linear, cell.case.load, cell.workload.schemes) == (row.linear, row.load, row.schemes)
            for candidate in map(cell.candidate, cell.configs[:KEPT_PER_CELL])
            if candidate.config == row.config
        )


def test_a_rejected_build_is_a_row_with_its_reason(tmp_path: Path) -> None:
    asked = request(tmp_path / "p.parquet", "w4a16_g128_sym")
    cells = plan(asked)
    spec = wanted_builds(asked, cells)[0]
    failure = Measurement.failed(Status.REJECTED, "spills: 64 bytes")
    rows = list(predict(asked, cells, {spec: Built(fingerprint="f" * 16, failure=failure)}))
    rejected = [row for row in rows if row.status is Status.REJECTED]
    assert rejected
    assert {(row.config, row.error, row.latency_us, row.kernel_fingerprint) for row in rejected} == {
        (spec.config, "spills: 64 bytes", None, "f" * 16)
    }


def test_wanted_builds_serve_every_load_and_linear(tmp_path: Path) -> None:
    asked = request(tmp_path / "p.parquet", "w4a16_g128_sym", "w8a8_g-1_sym", tokens=(1, 16, 256, 4096))
    specs = wanted_builds(asked, plan(asked))
    for scheme in asked.schemes:
        configs = [spec.config for spec in specs if spec.schemes == (scheme,)]
        assert 2 <= len(configs) <= BUILDS_PER_KERNEL[Effort.QUICK]
        assert len({config.tile.n for config in configs}) > 1  # decode and prefill want other tiles
    assert len(set(specs)) == len(specs)


def test_least_regret_covers_loads() -> None:
    latency_us = np.array([[1.0, 9.0, 9.0], [5.0, 1.0, 5.0], [1.1, 1.1, np.inf], [9.0, 9.0, 1.0]])
    assert least_regret(latency_us, 2) == [1, 0]
    assert sorted(least_regret(latency_us, 4)) == [0, 1, 3]  # the third row loses nothing any more
    assert least_regret(latency_us[:, :1], 3) == [0]


@needs_compiler
@pytest.mark.timeout(300)
def test_what_was_built_has_real_facts_and_the_rerun_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path / "cache"))
    asked = request(tmp_path / "p.parquet", "w4a16_g128_sym")
    cells = plan(asked)
    result = sweep(asked, cells, Choice(source=Source.PREDICTED))
    specs = wanted_builds(asked, cells)
    built = compiled(specs, asked.gpu, silent)
    assert all(KernelCache(root=tmp_path / "cache").get(spec) for spec in specs)
    rows = ProfileStore(asked.out).records(status=Status.OK)
    real = rows[rows["kernel_fingerprint"] != ""]
    assert set(real["kernel_fingerprint"]) == {spec.fingerprint() for spec in specs}
    for _, row in real.iterrows():
        facts = next(outcome.facts for spec, outcome in built.items() if spec.config.name == row["config"])
        assert facts is not None
        assert not facts.is_estimated
        cell = next(
            c
            for c in cells
            if (c.workload.linear, c.case.load.tokens_per_expert) == (row["linear"], tuple(row["tokens_per_expert"]))
        )
        config = next(config for config in cell.configs if config.name == row["config"])
        shape = GemmShape(m=cell.case.load.total, n=int(row["n"]), k=int(row["k"]))
        expected = launch_latency(asked.gpu, shape, cell.case.load, asked.schemes, config, facts)
        assert row["latency_us"] == pytest.approx(expected.latency_us)
    assert all("dsl" in versions for versions in real["versions"])
    assert any(cell.is_built for cell in result.best)

    monkeypatch.setattr("kernel_gen.pool.num_workers", lambda *_: pytest.fail("it compiled again"))
    again = sweep(asked, cells, Choice(source=Source.PREDICTED))
    assert again.num_new == 0
    assert again.best == result.best


@needs_compiler
@pytest.mark.timeout(300)
def test_a_bundle_gives_its_kernels_and_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path / "cache"))
    asked = request(tmp_path / "p.parquet", "w4a16_g128_sym")
    specs = wanted_builds(asked, plan(asked))[:2]
    gated = compiled_and_gated(specs, asked.gpu, silent)
    bundle = write_bundle(tmp_path / "bundle", asked.gpu, gated.kept, gated.refused)
    words = ["--backend", "predict", "--bundle", str(bundle.path), "--model", "olmoe-1b-7b", "--tokens", "1,256"]
    assert main(["--gpu", "rtx4090", *words, "--out", str(asked.out)]) == 0
    rows = ProfileStore(asked.out).records()
    assert set(rows["kernel_fingerprint"]) == {spec.fingerprint() for spec in specs}
    assert len(rows) == 2 * 2 * 2
    capsys.readouterr()

    assert main(["--gpu", "l40s", *words, "--out", str(tmp_path / "l40s.parquet")]) == 2
    assert "was built for rtx4090 (sm_89), not l40s" in capsys.readouterr().err
    assert main(["--gpu", "rtx4090", *words, "--schemes", "w16a16", "--out", str(asked.out)]) == 2
    assert "has no kernel for w16a16" in capsys.readouterr().err


def test_a_mix_gives_every_scheme_its_share() -> None:
    names = ("w16a16", "w4a16_g128_sym", "w8a8_g-1_sym")
    first, second, third = (schemes.parse(name) for name in names)
    mix = Mix(shares=((first, 0.5), (second, 0.49), (third, 0.01)))
    assigned = mix.assign(60, seed=1)
    assert [assigned.count(scheme) for scheme in (first, second, third)] == [30, 29, 1]
    assert assigned == mix.assign(60, seed=1)
    assert assigned != mix.assign(60, seed=2)
    assert sorted(scheme.name for scheme in mix.assign(3, seed=0)) == sorted(names)
    with pytest.raises(SpecError, match="needs at least 3 experts"):
        mix.assign(2, seed=0)


@needs_compiler
def test_build_only_fills_the_cache_with_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path / "cache"))
    words = "--gpu rtx4090 --model olmoe-1b-7b --tokens 16 --schemes w4a16_g128_sym --tries 1 --json --build-only"
    found = []
    for _ in range(2):
        assert main([*words.split(), "--out", str(tmp_path / "p.parquet")]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == {"candidates": 2, "kernels": 1, "were_cached": 0, "refused": 0}
    assert found[1] == {**found[0], "were_cached": 1}
    assert not (tmp_path / "p.parquet").exists()
