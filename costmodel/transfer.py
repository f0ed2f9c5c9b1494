"""`python -m costmodel.transfer`: a cost table of a card that was never measured, from another card's profiles."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel import features
from costmodel.fit import read_profiles
from costmodel.published import candidates_of, check
from costmodel.sessions import finished, usable
from costmodel.table import CostTable
from costmodel.transfer_model import TransferModel, bottlenecks
from profiles.errors import DataError, UserError
from profiles.interrupt import interruptible
from profiles.kernels import Family

Array = npt.NDArray[np.float64]
MIN_ROWS, MIN_REST = 200, 50
"""Rows that a fit needs, and that a held-out bottleneck must leave."""
_NORMAL_90, _NORMAL_80 = 1.6448536269514722, 0.8416212335729143


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake, whose sentence goes to stderr."""
    arguments = _parser().parse_args(argv)
    try:
        source = of_portable_kernels(usable(read_profiles(arguments.profile)))
        launches = of_portable_kernels(finished(read_profiles(arguments.launches)))
        model = fit(source)
        priced = price(model, launches)
        CostTable.from_profile(priced, model_version="transferred").write(arguments.out)
        checked = check(model, candidates_of(launches))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    unseen = unseen_regime_errors(source)
    if arguments.json:
        print(as_json(unseen, checked))
        return 0
    width = float(np.median(priced["upper_us"] / priced["lower_us"] - 1.0))
    print(f"{arguments.out}: {len(priced)} launches on {priced['gpu'].iloc[0]}, predicted from {len(source)} on"
          f" {source['gpu'].iloc[0]}; median width of the 90% intervals {100 * width:.0f}%")  # fmt: skip
    print(f"On {source['gpu'].iloc[0]} with one bottleneck held out: mean error {100 * unseen['mean_ape']:.1f}%,"
          f" intervals cover {100 * unseen['coverage_90']:.0f}%")  # fmt: skip
    print(_as_text(checked))
    return 0


def fit(rows: pd.DataFrame) -> TransferModel:
    """A model of a profile's usable rows of portable kernels. DataError: too few."""
    if len(rows) < MIN_ROWS:
        raise DataError(f"{len(rows)} finished rows of the {Family.MMA.value} family: {MIN_ROWS} are needed")
    return TransferModel().fit(features.of_profile(rows), rows["latency_us"].to_numpy(dtype=np.float64))


def price(model: TransferModel, launches: pd.DataFrame) -> pd.DataFrame:
    """The launches with the model's latencies for their predicted ones: latency_us, lower_us and upper_us (90%), and
    p20_us and p80_us of the normal distribution of the log that these are of.
    """
    latency, lower, upper = model.predict(features.of_profile(launches), return_interval=True)
    spread = _NORMAL_80 * np.log(upper / latency) / _NORMAL_90
    return launches.assign(
        latency_us=latency,
        lower_us=lower,
        upper_us=upper,
        p20_us=latency * np.exp(-spread),
        p80_us=latency * np.exp(spread),
    )


def of_portable_kernels(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the family that runs on every card. DataError: there are none."""
    kept = rows[rows["config"].str.startswith(f"{Family.MMA.value}_")].reset_index(drop=True)
    if kept.empty:
        raise DataError(f"no row of the {Family.MMA.value} family, which is what carries over to another card")
    return kept


def unseen_regime_errors(rows: pd.DataFrame) -> dict[str, float]:
    """Mean absolute error and 90% coverage on the source card, each bottleneck's launches predicted from the others'
    as if on another card: the nearest thing to a card that was never measured that one card's measurements allow.
    """
    X, y = features.of_profile(rows), rows["latency_us"].to_numpy(dtype=np.float64)
    regimes = bottlenecks(X.to_numpy())
    predicted, inside = np.full(len(y), np.nan), np.zeros(len(y), dtype=np.bool_)
    for regime in np.unique(regimes):
        held_out = regimes == regime
        if (~held_out).sum() < MIN_REST:
            continue
        model = TransferModel().fit(X[~held_out], y[~held_out])
        latency, lower, upper = model.predict(X[held_out], return_interval=True)
        predicted[held_out], inside[held_out] = latency, (lower <= y[held_out]) & (y[held_out] <= upper)
    tested = np.isfinite(predicted)
    error = np.abs(predicted[tested] / y[tested] - 1.0)
    return {"mean_ape": float(error.mean()), "coverage_90": float(inside[tested].mean())}


def as_json(unseen: Mapping[str, float], checked: pd.DataFrame) -> str:
    """{"unseen_regimes": errors, "published": [figure]}."""
    return json.dumps({"unseen_regimes": dict(unseen), "published": checked.to_dict("records")}, indent=1)


def _as_text(checked: pd.DataFrame) -> str:
    """A Markdown table of published figures, and how far off they are."""
    if checked.empty:
        return "No published figure is of these schemes: there is nothing to check such predictions against."
    lines = ["| GPU | scheme | experts | tokens | published, us | predicted, us | 90% interval | ratio | source |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in checked.to_dict("records"):
        lines.append(
            f"| {row['gpu']} | {row['scheme']} | {row['experts']} | {row['tokens']} | {row['published_us']:.0f} |"
            f" {row['predicted_us']:.0f} | {row['lower_us']:.0f} to {row['upper_us']:.0f} |"
            f" {row['predicted_us'] / row['published_us']:.2f}{' (a bound)' if row['is_bound'] else ''} |"
            f" {row['source']} |"
        )
    for gpu, rows in checked[~checked["is_bound"]].groupby("gpu", sort=False):
        error = (rows["predicted_us"] / rows["published_us"] - 1.0).abs()
        inside = rows["published_us"].between(rows["lower_us"], rows["upper_us"])
        lines.append(
            f"{gpu}: mean difference {100 * error.mean():.0f}%, {inside.sum()} of {len(rows)} in the interval."
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m costmodel.transfer",
        description="Predict a card that was never measured from another card's measurements of the same kernels, and"
        " check it against published figures.",
    )
    parser.add_argument("--profile", type=Path, nargs="+", required=True, metavar="FILE", help="the measured card's")
    parser.add_argument(
        "--launches",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="the other card's launches, with its builds' occupancy: profiles that `kernel_gen.sweep --backend predict`"
        " wrote",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the cost table (Parquet)")
    parser.add_argument("--json", action="store_true", help="print errors and published figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
