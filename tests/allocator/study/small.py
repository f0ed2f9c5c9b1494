"""A study small enough for a test: olmoe's shapes, one layer, analytic latencies with a few known ones."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from allocator.budget import Budget
from allocator.sensitivity import Sensitivity
from allocator.study.evaluate import Evaluator
from allocator.study.evidence import Evidence
from allocator.study.problem import of as problem_of
from allocator.study.run import evaluator_of
from profiles import loads, schemes
from profiles.gpus import gpu
from profiles.models import Linear, model

MODEL = model("olmoe-1b-7b")
NAMES = (
    "w16a16",
    "w8a16_g-1_sym",
    "w4a16_g128_asym",
    "w4a8_g128_sym_e4m3",
    "w2a16_g128_asym",
    "w8a8_g-1_sym_e4m3",
    "w3a16_g128_sym",
)
LOADS = {
    "decode": loads.log_normal(MODEL.num_experts, 16, MODEL.top_k),
    "prefill": loads.log_normal(MODEL.num_experts, 4096, MODEL.top_k),
}


def a_sensitivity(*, layers: int = 1, seed: int = 0, zero: bool = False) -> Sensitivity:
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(layers):
        for expert in range(MODEL.num_experts):
            for linear in Linear:
                weight = 0.0 if zero else rng.lognormal(0, 1.5)
                for name in NAMES:
                    scheme = schemes.parse(name)
                    error = 4.0**-scheme.weight_bits + (4.0**-6 if scheme.activation_bits < 16 else 0)
                    rows.append((layer, expert, linear.value, name, weight * error * rng.lognormal(0, 0.2)))
    frame = pd.DataFrame(rows, columns=["layer", "expert", "linear", "scheme", "loss"])
    return Sensitivity(
        frame.assign(model=MODEL.name, metric="block_l2", data="synthetic", num_samples=4, seed=seed, schema_version=1)
    )


EVIDENCE = Evidence(gpu=gpu("h200"), loads=LOADS)


@cache
def an_evaluator(budget_bits: float = 4.25, max_decode_us: float | None = None) -> Evaluator:
    limits = {} if max_decode_us is None else {"decode": max_decode_us}
    budget = Budget(avg_weight_bits=budget_bits, max_latency_us=limits)
    return evaluator_of(problem_of(a_sensitivity(), MODEL, budget, EVIDENCE))


def a_profile(path: Path) -> Path:
    """A predicted profile of three schemes under LOADS, as a sweep writes it."""
    from costmodel.analytic import launch_latencies
    from costmodel.launches import Launch
    from kernel_gen.legality import estimated_facts
    from kernel_gen.space import Effort, candidates
    from profiles.kernels import GemmShape
    from profiles.records import ProfileRecord, Source, Status
    from profiles.store import ProfileStore

    with ProfileStore(path, gpu="h200") as store:
        for linear in Linear:
            n, k = MODEL.gemm(linear)
            for name in NAMES[1:]:
                scheme = schemes.parse(name)
                for load in LOADS.values():
                    for config in candidates((scheme,), EVIDENCE.gpu, Effort.QUICK)[::3]:
                        facts = estimated_facts(config, (scheme,), EVIDENCE.gpu)
                        launch = Launch(
                            shape=GemmShape(m=1, n=n, k=k), load=load, schemes=(scheme,), config=config, facts=facts
                        )
                        us = float(launch_latencies(EVIDENCE.gpu, [launch])["latency_us"].iloc[0]) * 1.2
                        store.append(
                            ProfileRecord(
                                gpu="h200",
                                model=MODEL.name,
                                linear=linear.value,
                                n=n,
                                k=k,
                                load=load,
                                schemes=(scheme,),
                                config=config,
                                status=Status.OK,
                                source=Source.PREDICTED,
                                latency_us=us,
                            )
                        )
    return path
