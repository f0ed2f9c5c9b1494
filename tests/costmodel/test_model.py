"""LatencyModel on made-up profiles: better than its core, never falling in tokens, honest intervals, and its file."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import features, fit, model_file, pricing
from costmodel.analytic import launch_latencies
from costmodel.columns import FEATURES, KINDS, PARTS, Kind
from costmodel.features import Kernels
from costmodel.kernel_use import KernelUse, nominal_facts
from costmodel.model import LatencyModel
from costmodel.model_file import FittedModel
from profiles import kernels, models, schemes
from profiles.errors import DataError, SpecError
from profiles.gpus import gpu as find_gpu
from profiles.loads import TokenLoad, generate
from tests.costmodel.synthetic import CONFIGS, SCHEMES, profile

H200 = find_gpu("h200")
EXPERTS = 8


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return profile(mixes=4)


@pytest.fixture(scope="module")
def fitted(rows: pd.DataFrame) -> FittedModel:
    return fit.fit(rows[rows["model"] != "delta"].reset_index(drop=True))


def _uses(names: tuple[str, ...] = SCHEMES, n: int = 1408, k: int = 2048) -> list[KernelUse]:
    configs = [kernels.parse(name) for name in CONFIGS]
    return [
        KernelUse(n=n, k=k, schemes=(schemes.parse(name),), config=config, ctas_per_sm=config.min_ctas_per_sm)
        for name in names
        for config in configs
    ]


def _mixed_uses() -> list[KernelUse]:
    mixes = (("w4a16_g128_sym", "w8a8_g-1_sym"), ("w16a16", "w8a8_g-1_sym", "w4a16_g128_sym"))
    return [
        KernelUse(
            n=1408,
            k=2048,
            schemes=tuple(schemes.parse(mix[expert % len(mix)]) for expert in range(EXPERTS)),
            config=kernels.parse(name),
            ctas_per_sm=kernels.parse(name).min_ctas_per_sm,
        )
        for mix in mixes
        for name in CONFIGS
    ]


KERNELS = Kernels(H200, [*_uses(), *_mixed_uses()])


def _matrix(loads: list[TokenLoad]) -> npt.NDArray[np.float32]:
    """Every kernel of KERNELS under each load, load by load."""
    count = len(KERNELS.uses)
    return KERNELS.matrix(loads, np.tile(np.arange(count), len(loads)), np.repeat(np.arange(len(loads)), count))


def test_unseen_model_beats_core(rows: pd.DataFrame, fitted: FittedModel) -> None:
    unseen = rows[rows["model"] == "delta"]
    X, y = features.of_profile(unseen), unseen["latency_us"].to_numpy()
    error = np.abs(fitted.model.predict(X) / y - 1.0).mean()
    core = np.abs(X["latency_us"].to_numpy() / y - 1.0).mean()
    # The core is about 20% off and the noise is 1%: the bias is smooth, and most of it must be found.
    assert error < 0.05 < core


def test_intervals_cover_unseen_model(rows: pd.DataFrame, fitted: FittedModel) -> None:
    unseen = rows[rows["model"] == "delta"]
    lower, upper = fitted.model.predict_interval(features.of_profile(unseen)).T
    y = unseen["latency_us"].to_numpy()
    assert 0.75 < ((lower <= y) & (y <= upper)).mean() <= 1.0
    assert np.median(upper / lower) < 1.4


def test_intervals_widen_with_coverage(rows: pd.DataFrame, fitted: FittedModel) -> None:
    X = features.of_profile(rows.iloc[:50])
    narrow = LatencyModel(**{**fitted.model.get_params(), "coverage": 0.5})
    narrow.__dict__.update({name: value for name, value in vars(fitted.model).items() if name.endswith("_")})
    inner, outer = narrow.predict_interval(X), fitted.model.predict_interval(X)
    assert (inner[:, 0] > outer[:, 0]).all()
    assert (inner[:, 1] < outer[:, 1]).all()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 700), min_size=EXPERTS, max_size=EXPERTS),
    more=st.lists(st.integers(0, 300), min_size=EXPERTS, max_size=EXPERTS),
)
def test_more_tokens_are_never_faster(fitted: FittedModel, tokens: list[int], more: list[int]) -> None:
    few = TokenLoad(tokens_per_expert=tuple(tokens), source="few")
    many = TokenLoad(tokens_per_expert=tuple(a + b for a, b in zip(tokens, more, strict=True)), source="many")
    X = _matrix([few, many])
    grows = [index for index, name in enumerate(FEATURES) if KINDS[name] is Kind.GROWS]
    fixed = [index for index, name in enumerate(FEATURES) if KINDS[name] is Kind.FIXED]
    before, after = np.split(X, 2)
    assert (after[:, grows] >= before[:, grows] * (1 - 1e-5)).all()
    np.testing.assert_array_equal(after[:, fixed], before[:, fixed])
    latency = fitted.model.latencies_us(X)
    assert (latency[len(before) :] >= latency[: len(before)] * (1 - 1e-5)).all()


def test_latency_never_falls_along_a_sweep(fitted: FittedModel) -> None:
    loads = [TokenLoad(tokens_per_expert=(count,) * EXPERTS, source="sweep") for count in range(0, 600, 3)]
    latency = fitted.model.latencies_us(_matrix(loads)).reshape(len(loads), -1)
    assert (np.diff(latency, axis=0) >= -1e-5 * latency[1:]).all()
    assert (latency[-1] > 1.2 * latency[0]).all()


def test_features_are_the_cores(rows: pd.DataFrame) -> None:
    some = rows.sample(60, random_state=0)
    loads = [TokenLoad(tokens_per_expert=tuple(t), source="row") for t in some["tokens_per_expert"]]
    launches = []
    for row, load in zip(some.to_dict("records"), loads, strict=True):
        config = kernels.parse(row["config"])
        used = tuple(schemes.parse(name) for name in row["schemes"])
        use = KernelUse(n=row["n"], k=row["k"], schemes=used, config=config, ctas_per_sm=config.min_ctas_per_sm)
        launches.append(use.launch(load))
    X, core = features.of_profile(some), launch_latencies(H200, launches)
    for name in ("latency_us", "dram_us", "makespan_us", "roofline_us", "waves"):
        np.testing.assert_allclose(X[name], core[name], rtol=1e-5)
    uniform = np.asarray([len(names) == 1 for names in some["schemes"]])
    for name in PARTS:
        np.testing.assert_allclose(X[name][uniform], core[name][uniform], rtol=1e-5)
    pd.testing.assert_frame_equal(features.of_launches(H200, launches), X.reset_index(drop=True))


def test_occupancy_is_the_builds_where_it_is_known(rows: pd.DataFrame) -> None:
    some = rows.iloc[:3].reset_index(drop=True)
    asked = [kernels.parse(name).min_ctas_per_sm for name in some["config"]]
    some["versions"] = pd.Series([{"ctas_per_sm": "7"}, {}, {"torch": "2.11"}])
    assert features.of_profile(some)["ctas_per_sm"].tolist() == [7, *asked[1:]]
    some["kernel_fingerprint"] = ["a", "b", "c"]
    built = {"a": nominal_facts(kernels.parse(some["config"][0]), ctas_per_sm=5)}
    assert features.of_profile(some, built)["ctas_per_sm"].tolist() == [5, *asked[1:]]
    some["versions"] = pd.Series([{}, {}, {"ctas_per_sm": "0"}])
    with pytest.raises(DataError, match="ctas_per_sm is '0'"):
        features.of_profile(some)


def test_a_row_without_a_gpu_is_refused(rows: pd.DataFrame) -> None:
    with pytest.raises(SpecError, match="unknown GPU 'nan'"):
        features.of_profile(rows.iloc[:3].assign(gpu=["h200", None, "h200"]))


def test_file_round_trip(fitted: FittedModel, rows: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    model_file.write(path, fitted)
    back = model_file.read(path)
    X = features.of_profile(rows)
    np.testing.assert_array_equal(back.model.predict(X), fitted.model.predict(X))
    np.testing.assert_array_equal(back.model.predict_interval(X), fitted.model.predict_interval(X))
    assert back.version == fitted.version
    assert (back.gpu, back.configs, back.num_rows) == (fitted.gpu, fitted.configs, fitted.num_rows)


@pytest.mark.parametrize(
    "damage", ["foreign", "truncated", "version", "features", "leaves", "nan", "pickle", "missing"]
)
def test_damaged_file_is_refused(fitted: FittedModel, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.npz"
    model_file.write(path, fitted)
    with np.load(path) as file:
        arrays = dict(file)
    if damage == "foreign":
        path.write_bytes(b"not a model")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-400])
    elif damage == "pickle":
        np.savez(path, header=np.asarray([{"format": "x"}], dtype=object))
    elif damage == "missing":
        path.unlink()
    else:
        if damage == "version":
            arrays["header"] = np.asarray(str(arrays["header"]).replace('"format_version": 2', '"format_version": 99'))
        elif damage == "features":
            arrays["tree_features"] = arrays["tree_features"] + 1000
        elif damage == "leaves":
            arrays["tree_leaves"] = arrays["tree_leaves"][:, :4]
        else:
            arrays["factors"] = arrays["factors"] * np.nan
        np.savez(path, **arrays)
    with pytest.raises(DataError, match="model"):
        model_file.read(path)


def test_same_seed_same_model(rows: pd.DataFrame) -> None:
    X, y = features.of_profile(rows.iloc[:300]), rows["latency_us"].to_numpy()[:300]
    one, two = (LatencyModel(num_trees=20, random_state=3).fit(X, y).predict(X) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_latency_that_is_not_positive_is_refused(rows: pd.DataFrame) -> None:
    X = features.of_profile(rows.iloc[:60])
    with pytest.raises(ValueError, match="positive"):
        LatencyModel(num_trees=5).fit(X, np.zeros(60))


def test_cost_table_takes_the_predicted_best(fitted: FittedModel) -> None:
    shape = models.model("mixtral-8x7b")
    loads = {"decode": generate("zipf", 8, 16, 2), "prefill": generate("uniform", 8, 2048, 2)}
    some = [schemes.parse(name) for name in SCHEMES[:2]]
    table = pricing.cost_table(fitted, shape, loads, some)
    assert len(table) == 2 * 2 * 2
    n, k = shape.gemm(models.Linear.DOWN)
    uses = _uses(SCHEMES[:1], n=n, k=k)
    choice = pricing.KernelChooser(fitted.model, H200, uses).choose(loads["decode"])
    row = table.frame().query("linear == 'down' and scheme == @SCHEMES[0] and scenario == 'decode'").iloc[0]
    assert row["config"] == choice.use.config.name
    assert row["latency_us"] == pytest.approx(choice.latency_us)
    assert row["model_version"] == fitted.version
    with pytest.raises(SpecError, match="experts"):
        pricing.cost_table(fitted, shape, {"wrong": generate("uniform", 16, 16, 2)}, some)
    with pytest.raises(SpecError, match="configuration"):
        pricing.cost_table(fitted, shape, loads, [schemes.parse("w2a16_g128_sym")])
    with pytest.raises(SpecError, match="model: expected a FittedModel, which names its GPU, got a LatencyModel"):
        pricing.cost_table(fitted.model, shape, loads, some)  # type: ignore[arg-type]
    few, many = (dataclasses.replace(load, source="trace") for load in loads.values())
    for wrong, says in (
        ({"moe_shape": "mixtral-8x7b"}, "moe_shape: expected a MoeShape, .*, got 'mixtral-8x7b'"),
        ({"schemes": some[0]}, "schemes: expected a list of .*, got QuantScheme"),
        ({"schemes": [SCHEMES[0]]}, rf"schemes: expected a list of .*, got \['{SCHEMES[0]}'\]"),
        ({"loads": few}, "loads: expected a list of TokenLoad, .*, got TokenLoad"),
        ({"loads": {"decode": [1] * 8}}, "loads: expected names and TokenLoads, got .* under 'decode'"),
        ({"loads": ["zipf"]}, "loads: expected names and TokenLoads, got 'zipf'"),
        ({"loads": [few, many]}, "loads: two different ones are called 'trace'; give a mapping"),
    ):
        arguments: dict[str, Any] = {"moe_shape": shape, "loads": loads, "schemes": some}
        with pytest.raises(SpecError, match=says):
            pricing.cost_table(fitted, **(arguments | wrong))
    assert len(pricing.cost_table(fitted, shape, [few, few], some)) == 2 * 2


def test_a_file_with_flipped_bits_is_refused(fitted: FittedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    model_file.write(path, fitted)
    whole = path.read_bytes()
    refused = 0
    for place in np.random.default_rng(0).integers(len(whole), size=40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = model_file.read(path)
        except DataError:
            refused += 1
        else:  # a bit that says nothing about the arrays, a time stamp say
            assert found.version == fitted.version
    assert refused > 30


def test_marginal_costs_rise_from_zero(fitted: FittedModel) -> None:
    costs = pricing.marginal_expert_costs(fitted.model, H200, _uses()[1], range(0, 300, 7))
    assert costs[0] == 0.0
    assert (np.diff(costs) >= 0).all()
    assert costs[-1] > costs[1] > 0


def test_a_hundred_thousand_rows_and_one_choice_are_fast(fitted: FittedModel) -> None:
    rng = np.random.default_rng(0)
    loads = [generate("zipf", EXPERTS, tokens, 2) for tokens in (1, 16, 256, 4096)]
    uniform = len(_uses())
    X = KERNELS.matrix(loads, rng.integers(uniform, size=100_000), rng.integers(len(loads), size=100_000))
    started = time.process_time()
    fitted.model.latencies_us(X)
    # 2 s for 1,000,000 rows on 2 cores is 0.4 s of CPU time for these; the bound leaves room for a slower CPU.
    assert time.process_time() - started < 0.8
    chooser = pricing.KernelChooser(fitted.model, H200, _uses(SCHEMES[:1]))
    chooser.choose(loads[0])
    seconds = []
    for load in loads * 10:
        started = time.process_time()
        chooser.choose(load)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 3e-3
