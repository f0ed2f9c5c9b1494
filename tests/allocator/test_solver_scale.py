"""The bars at full size, 58 layers x 256 experts x 3 linears x 8 schemes, in a process of its own: its peak memory is
its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, pathlib, re, time
import numpy as np
from allocator import solve_arrays
from tests.allocator.instances import realistic
def peak_kib():  # getrusage would begin at the test runner's own memory, which an exec does not reset
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
loss, bits, sizes, latency = realistic(layers=58, experts=256, seed=SEED)
one_seconds = np.inf
for _ in range(3):  # the machine may be shared
    start = time.perf_counter()
    one = solve_arrays(loss, bits, avg_bits=AVG, sizes=sizes, latency_us=latency)
    one_seconds = min(one_seconds, time.perf_counter() - start)
limits = one.latency_us * FACTOR
start = time.perf_counter()
three = solve_arrays(loss, bits, avg_bits=AVG, sizes=sizes, latency_us=latency, max_latency_us=limits)
three_seconds = time.perf_counter() - start
rows = np.arange(len(loss))
print(json.dumps({
    "blocks": len(loss), "one_seconds": one_seconds, "one_gap": one.gap,
    "three_seconds": three_seconds, "three_gap": three.gap,
    "bits": max(bits[one.assignment].mean(), bits[three.assignment].mean()) / AVG,
    "latency": (latency[rows, three.assignment].sum(axis=0) / limits).max(),
    "monotone": three.loss >= one.bound, "peak_mb": peak_kib() / 1e3,
}))
"""


@pytest.mark.parametrize(("avg_bits", "factor", "seed"), [(4.25, 0.95, 0), (5.0, 0.85, 1), (3.3, 0.92, 2)])
def test_the_largest_model_in_seconds(avg_bits: float, factor: float, seed: int) -> None:
    program = PROGRAM.replace("SEED", str(seed)).replace("AVG", str(avg_bits)).replace("FACTOR", str(factor))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert result["blocks"] == 44_544
    assert result["one_seconds"] < 1.0
    assert result["three_seconds"] < 10.0
    assert result["one_gap"] <= 1e-4
    assert result["three_gap"] <= 1e-4
    assert result["bits"] <= 1 + 1e-12
    assert result["latency"] <= 1 + 1e-12
    assert result["monotone"]
    assert result["peak_mb"] < 1000
