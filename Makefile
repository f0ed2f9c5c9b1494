# Everything a fresh machine needs is Python 3.11-3.13 and make: the first command makes .venv and fills it from pip's wheels.
#   make sweep            a cost table for an RTX 4090: measured where there is one, predicted elsewhere
#   make test             linters, types, import directions and the tests that need no GPU
#   make lint             the linters alone
#   make gpu-test         the tests that need a GPU; what they reported goes to tests/reports/
#   make bench            speed of build, packing, prediction (and kernels, with a GPU) against the stored baseline
#   make bench-baseline   store this machine's speed as the baseline
#   make bench-peers      our kernels against the fastest public ones: recorded; on an H200 also measured, beside torch and Triton
#   make clean            remove what the others made, .venv included
# Choose an interpreter with PYTHON=python3.12, another sweep with GPU=, MODEL=, EFFORT= and SWEEP_ARGS=.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help sweep test lint gpu-test bench bench-run bench-baseline bench-peers clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
BUILD := build
comma := ,

GPU ?= rtx4090
MODEL ?= qwen1.5-moe-a2.7b
EFFORT ?= quick
SWEEP_ARGS ?=
PEERS_ARGS ?=
SWEEP_OUT := $(BUILD)/sweep/$(GPU)-$(MODEL)

# Predicting needs no torch. Measuring does, and only a machine whose driver lists a GPU can measure.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q . && echo yes)
SWEEP_EXTRAS := compile$(if $(HAS_GPU),$(comma)torch)
SWEEP_STAMP := $(VENV)/.sweep$(if $(HAS_GPU),-gpu)
TEST_EXTRAS := all,dev

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON); set PYTHON to a Python 3.11, 3.12 or 3.13" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "make: $$($(PYTHON) --version 2>&1) is not 3.11, 3.12 or 3.13; name one that is: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "* making a virtual environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@touch $@

$(SWEEP_STAMP): $(VENV)/.created pyproject.toml
	@echo "* installing bitile[$(SWEEP_EXTRAS)] into $(VENV), a few minutes the first time"
	@$(PIP_INSTALL) --editable '.[$(SWEEP_EXTRAS)]'
	@touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml
	@echo "* installing bitile[$(TEST_EXTRAS)] into $(VENV), a few minutes the first time"
	@$(PIP_INSTALL) --editable '.[$(TEST_EXTRAS)]'
	@touch $@

sweep: $(SWEEP_STAMP)
	@echo "* sweeping $(MODEL) on $(GPU), effort $(EFFORT); results in $(SWEEP_OUT)"
	@$(BIN)/python -m kernel_gen.sweep --gpu $(GPU) --model $(MODEL) --effort $(EFFORT) --out $(SWEEP_OUT) $(SWEEP_ARGS)

lint: $(VENV)/.test
	@echo "* ruff: style and common mistakes"
	@$(BIN)/ruff check --quiet --output-format=concise .
	@$(BIN)/ruff format --quiet --check .
	@echo "* mypy: types"
	@$(BIN)/mypy --no-error-summary
	@echo "* import-linter: imports go one way"
	@$(BIN)/lint-imports

test: lint
	@echo "* pytest: every test that needs no GPU and no patience (make gpu-test, pytest --slow)"
	@$(BIN)/python -m pytest -m 'not gpu and not slow'

# A Python that already has torch with a GPU and the tests' packages is used as it is; else one is made beside it, on top of its torch if that sees a GPU.
gpu-test:
	@tests/run_gpu.sh $(PYTHON)

bench-run: $(VENV)/.test
	@echo "* pytest-benchmark: speed on this machine"
	@mkdir -p $(BUILD)
	@$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=$(BUILD)/bench.json

bench: bench-run
	@echo "* against the stored baseline"
	@$(BIN)/python -m bench.compare bench/baselines $(BUILD)/bench.json

bench-baseline: bench-run
	@$(BIN)/python -m bench.compare --store $(BUILD)/bench.json

bench-peers: $(VENV)/.test
	@echo "* recorded launches against the fastest public kernels; results in docs/peers"
	@$(BIN)/python -m bench.peers
	@if nvidia-smi -L 2>/dev/null | grep -q H200; then \
	  echo "* ours, torch's and Triton's kernels in one run; results in docs/peers"; \
	  $(BIN)/python -m bench.peers --measure $(PEERS_ARGS); fi

clean:
	@echo "* removing $(VENV), $(BUILD) and caches"
	@rm -rf $(VENV) .venv-gpu $(BUILD) *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
