"""The command: what it refuses and in which words, what it prints, and that prediction needs no torch and no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_gen.sweep import main
from kernel_gen.sweeping import arguments, backends
from kernel_gen.sweeping.detect import InstalledGpu
from profiles.records import Source, Status
from profiles.store import ProfileStore

ROOT = Path(__file__).parents[3]
SCHEMES = "w16a16,w4a16_g128_sym,w8a8_g-1_sym"
SMALL = f"--gpu rtx4090 --backend predict --model olmoe-1b-7b --tokens 1,64,1024 --schemes {SCHEMES}"


@pytest.fixture(autouse=True)
def estimates_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler and no GPU, so that these tests take milliseconds; test_predict.py compiles."""
    monkeypatch.setattr(backends, "can_compile", lambda: False)
    monkeypatch.setattr(backends, "installed_gpus", lambda: ())
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    code = main(words.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpu rtx9999", "unknown GPU 'rtx9999'"),
        ("--gpu b200", "b200 is sm_100a"),
        ("--gpu rtx4090 --model nosuch", "unknown model 'nosuch'"),
        ("--gpu rtx4090 --model ./nosuch/config.json", "nosuch"),
        ("--gpu rtx4090 --schemes w5a5_g-1_sym", "no scheme 'w5a5_g-1_sym'"),
        ("--gpu rtx4090 --schemes banana", "unknown scheme 'banana'"),
        ("--gpu h200 --schemes w4a4_g-1_sym", "no int4 tensor cores on sm_90"),
        ("--gpu rtx4090 --linear attention", "unknown linear 'attention'"),
        ("--gpu rtx4090 --family tensor", "unknown family 'tensor'"),
        ("--gpu rtx4090 --family wgmma", "its kernels are for sm_90a; rtx4090 is sm_89"),
        ("--gpu rtx4090 --linear shared_down --model mixtral-8x7b", "has no shared experts"),
        ("--gpu rtx4090 --tokens 0", "--tokens '0'"),
        ("--gpu rtx4090 --tokens=-4", "--tokens '-4'"),
        ("--gpu rtx4090 --tokens 1,,2", "--tokens ''"),
        ("--gpu rtx4090 --tokens 1.5", "--tokens '1.5'"),
        ("--gpu rtx4090 --tokens many", "--tokens 'many'"),
        ("--gpu rtx4090 --load sometimes", "unknown load 'sometimes'"),
        ("--gpu rtx4090 --load broken.json", "broken.json"),
        ("--gpu rtx4090 --load seven.json", "has 7 experts, qwen1.5-moe-a2.7b has 60"),
        ("--gpu rtx4090 --cells 0", "--cells 0: at least 1"),
        ("--gpu rtx4090 --build-only --guided", "leave out --guided and --worth"),
        ("--gpu rtx4090 --build-only --backend predict", "leave out --bundle, --ray and --backend predict"),
        ("--gpu rtx4090 --mixed w16a16", "at least two schemes"),
        ("--gpu rtx4090 --mixed w16a16+w16a16", "w16a16 is there twice"),
        ("--gpu rtx4090 --mixed w16a16:0+w4a16_g128_sym", "the share '0' of w16a16"),
        ("--gpu rtx4090 --mixed w4a4_g-1_sym+w4a4_g128_sym", "one int4 activation tensor"),
        ("--gpu rtx4090 --seed -1", "--seed -1"),
        ("--gpu rtx4090 --time-limit 0", "--time-limit 0"),
        ("--gpu rtx4090 --tries 0", "--tries 0"),
        ("--gpu rtx4090 --bundle empty", "empty is not a bundle"),
        ("--gpu rtx4090 --out notes.txt", "notes.txt is a file that is no profile"),
        ("--gpu rtx4090 --out /proc/here/x.parquet", "cannot be written"),
        ("--gpu rtx4090 --out foreign.parquet", "foreign.parquet"),
        ("--gpu rtx4090 --backend cuda", "needs the GPU rtx4090, and no NVIDIA GPU was found"),
    ],
)
def test_a_mistake_is_one_sentence_and_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "foreign.parquet").write_bytes(b"PAR1 not really PAR1")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "seven.json").write_text('{"0": [1, 2, 3, 4, 5, 6, 7]}')
    code, out, err = run(capsys, words)
    assert code == 2
    assert said in err
    assert err.startswith("sweep: ")
    assert err.count("\n") == 1
    assert out == ""
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_profile_of_another_gpu_is_refused_and_unchanged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, f"{SMALL} --out p.parquet")[0] == 0
    before = (tmp_path / "p.parquet").read_bytes()
    code, _, err = run(capsys, "--gpu l40s --backend predict --out p.parquet")
    assert code == 2
    assert "rows of the GPU rtx4090, where l40s is expected" in err
    assert (tmp_path / "p.parquet").read_bytes() == before


def test_auto_without_the_gpu_predicts_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, SMALL.replace("predict", "auto") + " --out p.parquet")
    assert code == 0
    remarks = [line for line in err.splitlines() if line.startswith("sweep: ")]
    assert remarks[0] == "sweep: no rtx4090 here (no NVIDIA GPU found), so latencies are predicted, not measured"
    assert "predicted on rtx4090" in out
    assert set(ProfileStore(tmp_path / "p.parquet").records()["source"]) == {Source.PREDICTED.value}


def test_the_other_gpu_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    other = InstalledGpu(name="NVIDIA H100 PCIe", uuid="GPU-1", compute_capability=(9, 0), driver="580.1")
    monkeypatch.setattr(backends, "installed_gpus", lambda: (other,))
    code, _, err = run(capsys, "--gpu h200 --backend cuda")
    assert code == 2
    assert "needs the GPU h200, and NVIDIA H100 PCIe was found" in err


def test_the_closing_table_names_the_best_of_each_scheme_and_load(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, f"{SMALL} --out p.parquet")
    assert code == 0
    assert "compiler here" in err
    for scheme in ("w16a16", "w4a16_g128_sym", "w8a8_g-1_sym"):
        assert out.count(scheme) >= 2  # gate_up and down
    assert "w4a16 beats w8a8 below" in out
    assert "(estimated facts)" in out


def test_json_is_the_whole_of_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, f"{SMALL} --out folder --json --explain")
    assert code == 0
    body = json.loads(out)
    assert body["source"] == "predicted"
    assert Path(body["profile"]) == Path("folder/profile.parquet")
    assert (tmp_path / body["heat_map"]).stat().st_size > 10_000
    assert len(body["best"]) == 2 * 3 * 3
    frame = ProfileStore(tmp_path / body["profile"]).records(status=Status.OK)
    for cell in body["best"]:
        rows = frame[
            (frame["linear"] == cell["linear"])
            & frame["schemes"].map(lambda names, scheme=cell["scheme"]: list(names) == [scheme])
            & (frame["tokens_per_expert"].map(sum) == cell["tokens"] * 8)
        ]
        assert cell["latency_us"] == rows["latency_us"].min()
        assert cell["config"] in set(rows["config"])
    assert {crossing["few"] for crossing in body["crossovers"]} == {"w4a16"}
    assert "legal" in body["rejections"]["w16a16"]


def test_running_twice_adds_nothing_and_prints_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, first, _ = run(capsys, f"{SMALL} --out p.parquet")
    rows = len(ProfileStore(tmp_path / "p.parquet").records())
    _, second, _ = run(capsys, f"{SMALL} --out p.parquet")
    assert len(ProfileStore(tmp_path / "p.parquet").records()) == rows
    assert f"{rows} new" in first
    assert "0 new" in second
    assert first.splitlines()[:-2] == second.splitlines()[:-2]


def test_predictions_of_another_model_version_are_not_mixed_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, f"{SMALL} --out p.parquet")
    monkeypatch.setattr("kernel_gen.sweeping.run.analytic_digest", lambda: "0123456789ab")
    code, _, err = run(capsys, f"{SMALL} --out p.parquet")
    assert code == 2
    assert "predictions of another version of the analytic model" in err


def test_mixes_traces_and_configs_from_disk(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": 320,
        "moe_intermediate_size": 200,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "shared_expert_intermediate_size": 400,
        "decoder_sparse_step": 1,
    }
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    (tmp_path / "trace.json").write_text(json.dumps({"0": [3, 0, 9, 0, 2, 2], "2": [0, 0, 0, 16, 0, 0]}))
    words = (
        "--gpu rtx4090 --backend predict --model tiny/config.json --load trace.json one_hot --tokens 8 --out p.parquet"
    )
    code, out, _ = run(capsys, f"{words} --linear gate_up shared_down --mixed w4a16_g128_sym:3+w8a8_g-1_sym --json")
    assert code == 0
    cells = json.loads(out)["best"]
    assert {(cell["linear"], cell["load"]) for cell in cells} == {
        ("gate_up", "trace.json layer 0"),
        ("gate_up", "trace.json layer 2"),
        ("gate_up", "one_hot"),
    }
    assert {cell["scheme"] for cell in cells} == {"w4a16_g128_sym:0.75+w8a8_g-1_sym:0.25"}
    schemes = ProfileStore(tmp_path / "p.parquet").records()["schemes"].iloc[0]
    assert sorted(schemes) == ["w4a16_g128_sym"] * 4 + ["w8a8_g-1_sym"] * 2


def test_prediction_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['cutlass'] = None\n"
        "import kernel_gen.sweeping.backends as b; b.can_compile = lambda: False\n"
        "from kernel_gen.sweep import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", script, *SMALL.split(), "--out", str(tmp_path / "p.parquet")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--gpu",
        "--bundle",
        "--model",
        "--tokens",
        "--schemes",
        "--effort",
        "--backend",
        "--ray",
        "--mixed",
    ):
        assert option in text
    examples = [line for line in arguments.EXAMPLES.splitlines() if "kernel_gen.sweep" in line]
    assert len(examples) == 4
