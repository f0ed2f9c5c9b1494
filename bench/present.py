"""The present tables: launches measured on one H200 with the present kernels, and the latency model fitted on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from costmodel.fit import fit, read_profiles
from costmodel.model_file import FittedModel
from costmodel.pricing import cost_table
from costmodel.sessions import usable
from costmodel.table import CostTable
from kernel_gen.space import Effort, candidates
from profiles import kernels
from profiles.gpus import gpu
from profiles.loads import TokenLoad
from profiles.models import MoeShape
from profiles.schemes import QuantScheme

FOLDER = Path(__file__).parent.parent / "profiles" / "data" / "h200"
UNIFORM, MIXED = FOLDER / "hopper_v2.parquet", FOLDER / "mixed_v2.parquet"


@cache
def latency_model(profiles: tuple[Path, ...] = (UNIFORM, MIXED)) -> FittedModel:
    """Fitted on all rows of these profiles; once a process."""
    return fit(usable(read_profiles(profiles)))


def priced(
    fitted: FittedModel, shape: MoeShape, loads: Mapping[str, TokenLoad], offered: Sequence[QuantScheme]
) -> CostTable:
    """Launches of the routed experts in one scheme: the fastest of the configurations that were measured with it, or of
    the quick space.
    """
    configs = {
        scheme: [kernels.parse(name) for name in fitted.configs.get(scheme.name, ())]
        or candidates((scheme,), gpu(fitted.gpu), Effort.QUICK, max_experts=shape.num_experts)
        for scheme in offered
    }
    return cost_table(fitted, shape, loads, offered, configs=configs)
