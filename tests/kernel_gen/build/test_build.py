import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kernel_gen import build as build_module
from kernel_gen import build_report, linker
from kernel_gen.build import BuildRequest, main, make_plan, parse_slots
from kernel_gen.bundle import load_bundle
from kernel_gen.pool import Failure, Outcome
from kernel_gen.space import Effort
from profiles import schemes
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import gpu
from profiles.models import find_model, model
from profiles.records import Status
from tests.kernel_gen.build.specs import RTX4090

ONE_KERNEL = "w2a16_g-1_sym"
MODEL = "qwen1.5-moe-a2.7b"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first two legal configurations of the space, and what is rejected before them."""
    enumerate_all = build_module.enumerate_configs

    def enumerate_few(*args: object, **kwargs: object) -> object:
        legal = 0
        for config, reasons in enumerate_all(*args, **kwargs):
            legal += not reasons
            yield config, reasons
            if legal == 2:
                return

    monkeypatch.setattr(build_module, "enumerate_configs", enumerate_few)


def command(out: Path, *more: str) -> list[str]:
    return ["--gpu", "rtx4090", "--model", MODEL, "--out", str(out), *more]


def request(slots: str = ONE_KERNEL, *, name: str = "rtx4090", model_name: str = MODEL) -> BuildRequest:
    return BuildRequest(
        gpu=gpu(name), model=find_model(model_name), out_dir=Path("out"), slots=parse_slots(slots), effort=Effort.QUICK
    )


@pytest.mark.usefixtures("few")
def test_first_build_compiles_and_a_second_is_immediate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    assert main(command(out, "--schemes", f"{ONE_KERNEL},w4a16_g128_sym+w8a8_g-1_sym")) == 0
    shown = capsys.readouterr()
    assert "4 kernels in" in shown.out
    assert "4 compiled, 0 from the cache" in shown.out
    first = load_bundle(out)
    assert {len(kernel.spec.schemes) for kernel in first.kernels} == {1, 2}
    started = time.perf_counter()
    assert main(command(out, "--schemes", f"{ONE_KERNEL},w4a16_g128_sym+w8a8_g-1_sym", "--json")) == 0
    assert time.perf_counter() - started < 5
    result = json.loads(capsys.readouterr().out)
    assert (result["num_kernels"], result["num_compiled"], result["num_cached"]) == (4, 0, 4)
    assert result["fingerprint"] == first.fingerprint
    assert {row["schemes"]: row["built"] for row in result["schemes"]} == {
        ONE_KERNEL: 2,
        "w4a16_g128_sym+w8a8_g-1_sym": 2,
    }


def test_plan_is_what_legality_admits() -> None:
    plan = make_plan(request("w8a8_g-1_sym"))
    assert plan.specs
    assert plan.rejected
    assert all(item.reasons for item in plan.rejected)
    assert {spec.arch for spec in plan.specs} == {"sm_89"}
    assert {spec.max_experts for spec in plan.specs} == {256}


def test_one_build_serves_every_model_of_at_most_256_experts() -> None:
    assert make_plan(request(model_name="mixtral-8x7b")) == make_plan(request(model_name="deepseek-v3"))


def test_models_with_more_experts_get_room(tmp_path: Path) -> None:
    import dataclasses

    big = dataclasses.replace(request(), model=dataclasses.replace(model(MODEL), num_experts=300))
    assert big.max_experts == 512


def test_gpu_without_kernels_is_refused_with_the_reasons() -> None:
    with pytest.raises(UnsupportedError, match="sm_100a"):
        make_plan(request(name="b200"))


def test_explain_shows_every_rejection_and_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(request("w8a8_g-1_sym,w4a8_g128_sym_e4m3"))
    build_report.print_rejected(plan, sys.stdout)
    lines = capsys.readouterr().out.splitlines()
    for item in plan.rejected:
        assert any(item.config.name in line and all(reason in line for reason in item.reasons) for line in lines)
    assert f"{len(plan.rejected)} configurations rejected before compiling, {len(plan.specs)} left" in lines
    counts = [int(line.split()[0]) for line in lines if re.match(r" +\d+  ", line)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == sum(len(item.reasons) for item in plan.rejected)


@pytest.mark.usefixtures("few")
def test_kernel_that_cannot_be_compiled_is_recorded_and_the_exit_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_all = build_module.compile_all

    def compile_with_one_crash(specs: list[object], *args: object, **kwargs: object) -> list[Outcome]:
        crashed = Failure(spec=specs[0], status=Status.CRASHED, error="the compiler's process ended with code -9")
        kwargs["on_outcome"](crashed)
        return [crashed, *compile_all(specs[1:], *args, **kwargs)]

    monkeypatch.setattr(build_module, "compile_all", compile_with_one_crash)
    assert main(command(tmp_path / "bundle", "--schemes", ONE_KERNEL)) == 1
    bundle = load_bundle(tmp_path / "bundle")
    assert [item.status for item in bundle.refused] == [Status.CRASHED]
    assert len(bundle.kernels) == 1
    assert "ended with code -9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "gtx9999"], ["gtx9999", "rtx4090"]),
        (["--gpu", "b200"], ["b200", "sm_100a"]),
        (["--model", "no-such-model"], ["no-such-model", MODEL]),
        (["--model", "./absent/config.json"], ["absent"]),
        (["--schemes", "w5a5"], ["w5a5"]),
        (["--schemes", ""], ["scheme"]),
        (["--schemes", "w4a16_g128_sym,"], ["scheme"]),
        (["--schemes", "w4a16_g128_sym+w4a16_g128_sym"], ["twice", "w4a16_g128_sym"]),
        (["--schemes", "+".join(scheme.name for scheme in schemes.KERNEL_SCHEMES[:5])], ["5 schemes", "1 to 4"]),
    ],
)
def test_a_users_mistake_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(command(tmp_path / "bundle", *arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    for word in words:
        assert word in shown.err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--jobs", "two"], ["--effort", "some"], ["--frobnicate"]])
def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command(tmp_path / "bundle", *arguments))
    assert caught.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_out_that_is_a_file_is_refused_before_anything_is_compiled(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    assert main(command(out, "--schemes", ONE_KERNEL)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{out} is a file" in error
    assert out.read_text() == "mine"
    assert not own_cache.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_compiled(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "bundle"
    assert main(command(out, "--schemes", ONE_KERNEL)) == 2
    assert f"{out}: nothing can be written there" in capsys.readouterr().err
    assert not own_cache.exists()


def test_missing_wheel_is_told_before_anything_is_compiled(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(linker, "CUDA_MAJOR", "cu99")
    assert main(command(tmp_path / "bundle", "--schemes", ONE_KERNEL)) == 2
    assert "pip install 'nvidia-cutlass-dsl[cu13]'" in capsys.readouterr().err
    assert not own_cache.exists()


def test_machine_without_the_compile_extra_is_told_what_to_install(tmp_path: Path) -> None:
    """What pip would leave out, hidden: the command says what to install instead of failing to import it."""
    hidden = ("pebble", "psutil", "nvidia_cutlass_dsl", "cutlass", "tvm_ffi", "torch")
    code = f"""
import importlib.metadata, sys
sys.modules.update(dict.fromkeys({hidden}))
installed = importlib.metadata.version
def version(name):
    if name.startswith("nvidia"):
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.version = version
from kernel_gen import build
sys.exit(build.main({command(tmp_path / "bundle", "--schemes", ONE_KERNEL)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'bitile[compile]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "python -m kernel_gen.build --gpu rtx4090" in capsys.readouterr().out


def test_scheme_lists() -> None:
    assert parse_slots("w16a16, w4a16_g128_sym + w8a8_g-1_sym,w16a16") == (
        (schemes.parse("w16a16"),),
        (schemes.parse("w4a16_g128_sym"), schemes.parse("w8a8_g-1_sym")),
    )
    with pytest.raises(SpecError):
        parse_slots("w4a16_g128_sym++w8a8_g-1_sym")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build_keeps_finished_kernels_and_leaves_no_process(
    tmp_path: Path, own_cache: Path, stop: signal.Signals
) -> None:
    arguments = command(tmp_path / "bundle", "--schemes", f"{ONE_KERNEL},w2a16_g-1_asym", "--jobs", "2")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    running = psutil.Popen(
        [sys.executable, "-m", "kernel_gen.build", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not (kept := list(own_cache.glob("??/*/kernel.o"))):
        assert time.monotonic() < deadline, "nothing was compiled"
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    workers = running.children(recursive=True)
    if stop is signal.SIGINT:
        os.killpg(running.pid, stop)  # as a terminal does: the workers get it too
    else:
        running.send_signal(stop)
    stopped = time.monotonic()
    _, error = running.communicate(timeout=20)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []
    assert time.monotonic() - stopped < 5
    if stop is signal.SIGINT:
        assert running.returncode == 130
        assert "the same command continues" in error
        assert "Traceback" not in error
    assert all(path.exists() for path in kept)
    assert not (tmp_path / "bundle").exists()
    assert count_cached(own_cache, f"{ONE_KERNEL},w2a16_g-1_asym") >= len(kept)


def count_cached(cache: Path, slots: str) -> int:
    """What the same command would find, asked of another process, as the user's next one is."""
    code = f"""
from pathlib import Path
from kernel_gen.cache import KernelCache
from tests.kernel_gen.build.test_build import make_plan, request
print(sum(KernelCache(root=Path({str(cache)!r})).get(spec) is not None for spec in make_plan(request({slots!r})).specs))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_full_disk_is_one_sentence_and_loses_no_finished_kernel(tmp_path: Path, own_cache: Path) -> None:
    arguments = command(tmp_path / "bundle", "--schemes", ONE_KERNEL)
    limited = f"ulimit -f 8; exec {sys.executable} -m kernel_gen.build {' '.join(arguments)}"  # files of 8 KiB at most
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["bash", "-c", limited], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(own_cache.glob("??/*")) == []


def test_kinds_are_counted_without_their_numbers() -> None:
    kinds = build_report.count_kinds([("smem 120 KiB > 99 KiB",), ("smem 130.5 KiB > 99 KiB", "2 stages"), ()])
    assert [(kind.count, kind.example) for kind in kinds] == [(2, "smem 120 KiB > 99 KiB"), (1, "2 stages")]


def test_default_builds_every_scheme() -> None:
    assert {slots[0] for slots in build_module.EVERY_SCHEME} == set(schemes.KERNEL_SCHEMES)
    assert RTX4090.arch == "sm_89"
