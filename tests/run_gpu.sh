#!/usr/bin/env bash
# Runs the tests marked gpu and writes tests/reports/<gpu>.json. Usage: tests/run_gpu.sh [PYTHON [pytest arguments...]]
# A Python that has torch with a GPU and the tests' packages is used as it is. One that has such a torch but not the rest gets an environment on top
# of its torch; where it has none, .venv's is used, with torch from pip.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true

sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
has_tools() { "$1" -c 'import pytest, pytest_timeout, pytest_benchmark, hypothesis, tvm_ffi, pandas, pyarrow, sklearn, rich, pynvml, pebble' 2>/dev/null; }

if sees_gpu "$python" && ! has_tools "$python"; then
  echo "* making .venv-gpu on top of $("$python" -c 'import torch; print("torch", torch.__version__)')"
  [[ -x .venv-gpu/bin/python ]] || "$python" -m venv --system-site-packages .venv-gpu
  .venv-gpu/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[compile,test]'
  python=.venv-gpu/bin/python
elif ! sees_gpu "$python"; then
  nvidia-smi -L 2>/dev/null | grep -q . || { echo "gpu-test: the driver lists no NVIDIA GPU here; the tests need one" >&2; exit 2; }
  make --no-print-directory .venv/.test PYTHON="$python"
  python=.venv/bin/python
  sees_gpu "$python" || { echo "gpu-test: torch sees none of the GPUs that nvidia-smi -L lists" >&2; exit 2; }
fi

echo "* pytest -m gpu; the report goes to tests/reports/"
mkdir -p tests/reports
exec "$python" -m pytest -m gpu --gpu-report tests/reports "$@"
