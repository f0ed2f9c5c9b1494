"""Transfer to a card that was never measured, on made-up profiles of two cards; published figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from costmodel import features, published, transfer
from costmodel.table import CostTable
from costmodel.transfer_model import TransferModel, bottlenecks
from profiles.errors import DataError
from profiles.records import ProfileRecord, Source
from profiles.store import ProfileStore
from tests.costmodel.synthetic import profile


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return profile(mixes=0, models=("alpha", "beta", "delta"))


@pytest.fixture(scope="module")
def model(measured: pd.DataFrame) -> TransferModel:
    return transfer.fit(measured)


@pytest.fixture(scope="module")
def unseen() -> pd.DataFrame:
    """The same kernels on another card; its true constants, too, are 15 to 55% from those that the core assumes."""
    return profile(seed=5, mixes=0, models=("alpha", "beta"), gpu="rtx4090")


def test_schemes_without_published_figures_are_priced(
    measured: pd.DataFrame, unseen: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = unseen[unseen["schemes"].map(lambda names: names[0] == "w4a16_g128_sym")]
    source, launches = _stored(measured.iloc[::2], tmp_path / "a"), _stored(only, tmp_path / "b")
    arguments = ["--profile", str(source), "--launches", str(launches), "--out", str(tmp_path / "table.parquet")]
    assert transfer.main(arguments) == 0
    assert "No published figure is of these schemes" in capsys.readouterr().out


def test_another_card_is_predicted_better_than_by_the_core(model: TransferModel, unseen: pd.DataFrame) -> None:
    X, y = features.of_profile(unseen), unseen["latency_us"].to_numpy()
    latency, lower, upper = model.predict(X, return_interval=True)
    error, of_core = np.abs(latency / y - 1.0).mean(), np.abs(X["latency_us"] / y - 1.0).mean()
    assert error < 0.15
    assert error < 0.7 * of_core
    _, source_lower, source_upper = model.model_.predict(X.to_numpy(), return_interval=True)
    assert (upper / lower > source_upper / source_lower).all(), "a card that was not measured is known less well"


def test_never_cheaper_with_more_tokens(model: TransferModel) -> None:
    rows = profile(mixes=0, models=("gamma",), gpu="rtx4090")
    rows = rows[rows["load_source"].str.startswith("uniform")]
    rows = rows.assign(tokens=rows["tokens_per_expert"].map(sum), scheme=rows["schemes"].str[0])
    rows["predicted"] = model.predict(features.of_profile(rows))
    for _, of_kernel in rows.sort_values("tokens").groupby(["scheme", "config"]):
        assert (np.diff(of_kernel["predicted"]) >= -1e-9).all()


def test_command(
    measured: pd.DataFrame, unseen: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _stored(measured.iloc[::2], tmp_path / "h200.parquet")
    launches = _stored(unseen.assign(source=Source.PREDICTED.value, num_samples=0), tmp_path / "rtx4090.parquet")
    out = tmp_path / "table.parquet"
    arguments = ["--profile", str(source), "--launches", str(launches), "--out", str(out)]
    assert transfer.main(arguments) == 0
    said = capsys.readouterr().out
    assert "predicted from 324 on h200" in said
    assert "with one bottleneck held out: mean error" in said
    assert "| rtx4090 | w16a16 | 1 | 8192 |" in said
    table = CostTable.read(out, gpu="rtx4090")
    assert set(table.frame()["source"]) == {"predicted"}
    assert (table.frame()["std_us"] > 0).all()


def test_json(measured: pd.DataFrame, unseen: pd.DataFrame) -> None:
    found = transfer.unseen_regime_errors(measured.iloc[::2])
    assert found["mean_ape"] < 0.15
    assert 0.75 < found["coverage_90"] <= 1.0
    checked = published.check(transfer.fit(measured), published.candidates_of(unseen))
    data = json.loads(transfer.as_json(found, checked))
    assert data["unseen_regimes"] == found
    assert {row["scheme"] for row in data["published"]} == {"w16a16"}


def _stored(rows: pd.DataFrame, path: Path) -> Path:
    with ProfileStore(path) as store:
        for row in rows.to_dict("records"):
            store.append(ProfileRecord.from_row({str(name): value for name, value in row.items()}))
    return path


def test_what_cannot_carry_over_is_refused(measured: pd.DataFrame) -> None:
    wgmma = measured.assign(config=measured["config"].str.replace("mma_", "wgmma_", regex=False))
    with pytest.raises(DataError, match="no row of the mma family"):
        transfer.of_portable_kernels(wgmma)
    with pytest.raises(DataError, match="200 are needed"):
        transfer.fit(measured.iloc[:50])


def test_published_figures() -> None:
    figures = {(figure.source, figure.scheme, figure.num_tokens): figure for figure in published.FIGURES}
    assert len(figures) == len(published.FIGURES)
    # 1070.5 TOPS on 8192 cubed (MxMoE, table 6).
    assert figures[published.MXMOE, "w4a4_g-1_sym", 8192].latency_us == pytest.approx(1027.1, rel=1e-4)
    load = figures[published.VLLM_4090D, "w8a8_g-1_sym_e4m3", 16].loads()[0]
    assert (load.num_experts, load.total) == (8, 32)


def test_bottlenecks_are_the_cores_largest_part(measured: pd.DataFrame) -> None:
    X = features.of_profile(measured)
    found = bottlenecks(X.to_numpy())
    assert (X["dram_us"][found == 0] >= X["issue_us"][found == 0]).all()
    assert len(np.unique(found)) > 1
