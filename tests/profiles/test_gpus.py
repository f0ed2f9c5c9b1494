import pickle

import pytest

from profiles.errors import SpecError
from profiles.gpus import GPUS, KIB, GpuSpec, Math, gpu

SPECS = pytest.mark.parametrize("spec", GPUS.values(), ids=str)


@SPECS
def test_a_gpu_is_found_by_its_name_and_crosses_processes(spec: GpuSpec) -> None:
    assert gpu(spec.name) is spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({spec, pickle.loads(pickle.dumps(spec))}) == 1


@SPECS
def test_a_gpu_states_its_sources_and_plausible_limits(spec: GpuSpec) -> None:
    assert all(len(source) > 20 for source in spec.sources)
    assert spec.smem_per_block_bytes == spec.smem_per_sm_bytes - KIB  # what the system keeps of each block's
    assert spec.max_threads_per_sm in (1536, 2048)
    assert spec.tensor_tops[Math.BF16] < spec.tensor_tops[Math.INT8]


@SPECS
def test_tensor_cores_are_those_of_the_architecture(spec: GpuSpec) -> None:
    assert (Math.INT4 in spec.tensor_tops) == (spec.arch in {"sm_80", "sm_86", "sm_89"})
    assert (Math.E4M3 in spec.tensor_tops) == (spec.compute_capability >= (8, 9))


@SPECS
def test_rates_follow_from_the_clock(spec: GpuSpec) -> None:
    """bf16 operations per SM and clock are a power of two: the sources' rate, clock and number of SMs agree."""
    per_clock = spec.tensor_tops[Math.BF16] * 1e6 / (spec.num_sms * spec.boost_clock_mhz)
    assert min(abs(per_clock / power - 1) for power in (512, 1024, 2048, 4096, 8192)) < 0.015


def test_the_geforce_rates_are_those_of_fp32_accumulation() -> None:
    tops = gpu("rtx4090").tensor_tops
    assert tops == {Math.BF16: 165.2, Math.INT8: 660.6, Math.E4M3: 330.3, Math.INT4: 1321.2}
    assert gpu("l40s").tensor_tops[Math.E4M3] == gpu("l40s").tensor_tops[Math.INT8]


def test_architectures() -> None:
    expected = ["sm_89", "sm_120", "sm_89", "sm_80", "sm_90a", "sm_90a", "sm_100a"]
    assert [gpu(name).arch for name in ("rtx4090", "rtx5090", "l40s", "a100", "h100", "h200", "b200")] == expected


@pytest.mark.parametrize("name", ["", "RTX4090", "gtx1080"])
def test_an_unknown_gpu_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(SpecError, match=f"unknown GPU '{name}': known are rtx4090, .*b200"):
        gpu(name)
