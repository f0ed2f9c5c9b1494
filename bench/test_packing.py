"""Speed of quantising, packing and unpacking, CPU time of one thread, for every scheme that some kernel runs."""

import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernel_gen.formats import pack, quantize, unpack  # noqa: E402 - needs torch
from profiles.schemes import KERNEL_SCHEMES, QuantScheme  # noqa: E402

pytestmark = [pytest.mark.usefixtures("keep_torch_on_one_thread"), pytest.mark.benchmark(timer=time.process_time)]

NUM_EXPERTS, N, K = 2, 1024, 2048
SIZE = {"weights": NUM_EXPERTS * N * K}


@pytest.fixture(scope="module")
def stack() -> Any:
    return torch.randn(NUM_EXPERTS, N, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KERNEL_SCHEMES, ids=lambda scheme: scheme.name)
def scheme(request: pytest.FixtureRequest) -> QuantScheme:
    chosen: QuantScheme = request.param
    return chosen


def test_quantize(benchmark: Any, stack: Any, scheme: QuantScheme) -> None:
    benchmark.extra_info |= SIZE
    benchmark.pedantic(quantize, args=(stack, scheme), rounds=21, warmup_rounds=1)


def test_pack(benchmark: Any, stack: Any, scheme: QuantScheme) -> None:
    benchmark.extra_info |= SIZE
    benchmark.pedantic(pack, args=(quantize(stack, scheme),), rounds=21, warmup_rounds=1)


def test_unpack(benchmark: Any, stack: Any, scheme: QuantScheme) -> None:
    benchmark.extra_info |= SIZE
    packed = pack(quantize(stack, scheme))
    benchmark.pedantic(unpack, args=(packed,), rounds=21, warmup_rounds=1)
