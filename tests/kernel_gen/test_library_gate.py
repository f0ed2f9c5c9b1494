"""What a library without a bundle compiles passes the gate, without a GPU: the compiler needs none."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cutlass")

from kernel_gen import compiler, select  # noqa: E402
from kernel_gen.experts import Experts  # noqa: E402
from kernel_gen.formats import pack, quantize  # noqa: E402
from kernel_gen.kernels import KernelSpec  # noqa: E402
from kernel_gen.library import KernelLibrary  # noqa: E402
from profiles import kernels, schemes  # noqa: E402
from profiles.errors import UnsupportedError  # noqa: E402
from profiles.gpus import GPUS  # noqa: E402

GPU = GPUS["h200"]
SCHEME = schemes.parse("w4a16_g128_asym")
SPILLS = kernels.parse("wgmma_256x256_w8x1x1_s3_k1_at_o1")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(select, "ranking", lambda gpu: select.Ranking.CORE)  # nothing has to be fitted first


def test_a_kernel_knows_its_own_occupancy() -> None:
    kernel = KernelLibrary(GPU).kernel(kernels.parse("mma_64x8_w4x1x1_s3_k1_at_o1"), (SCHEME,))
    assert kernel.ctas_per_sm > 1  # more than it asks for: what fits was read off the build


def test_a_kernel_that_spills_is_refused_with_the_numbers() -> None:
    library = KernelLibrary(GPU)
    for _ in range(2):  # refused the second time without a build
        with pytest.raises(UnsupportedError, match=r"spills \d+ bytes"):
            library.kernel(SPILLS, (SCHEME,))


def test_the_next_best_is_taken_where_the_gate_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[KernelSpec] = []

    def load(spec: KernelSpec, gpu: object) -> tuple[object, object]:
        asked.append(spec)
        raise UnsupportedError(spec.label, ["refused"])

    monkeypatch.setattr(compiler, "load_gated", load)
    experts = Experts([pack(quantize(torch.randn(2, 64, 128), SCHEME))], [[0, 1]])
    library = KernelLibrary(GPU)
    with pytest.raises(UnsupportedError, match="the build refused every configuration"):
        library.best(experts, 8)
    tried = [spec.config for spec in asked]
    assert len(tried) == len(set(tried)) > 3
    assert tried[0] == select.choose([SCHEME] * 2, 64, 128, 8, GPU)
    with pytest.raises(UnsupportedError):
        library.best(experts, 4096)
    assert len(asked) == len(tried), "what was refused is not built again"
