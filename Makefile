# make generate            write the demo's completions to out/demo
# make generate CONFIG=my.yaml ARGS="--limit 100"
# make test                run the fast tests, offline, on all cores
# make test-all            run the slow tests too, as CI does: full shapes, kernel builds, wide grids
# make check               lint, types and tests
# make soak                500 rounds of runs that are killed at random moments and resumed
# make bench               new tokens per second of gptbatch and transformers, in turn
# make ablation            new tokens per second with each optimization off, in turn
# make cuda-check          bits and times of the Triton kernels and their engine, on a GPU, by $(PYTHON)
# make bench-peers PEERS=~/peers    the same with the peers that have an environment there (benchmarks/compare.py)
PYTHON ?= python3
CONFIG ?= demo
ARGS ?=
PEERS ?= peers
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: install generate test test-all lint types check soak bench ablation cuda-check bench-peers clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

generate: install
	$(BIN)/gptbatch generate --config $(CONFIG) $(ARGS)

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: install
	$(BIN)/mypy

check: lint types test

soak: install
	$(BIN)/python -m tests.soak

bench: install
	$(BIN)/python benchmarks/compare.py --workloads uniform --repeats 3 $(ARGS)

ablation: install
	$(BIN)/python -m benchmarks.ablation $(ARGS)

cuda-check:
	$(PYTHON) benchmarks/cuda_check.py $(ARGS)

bench-peers: install
	$(BIN)/python benchmarks/compare.py --programs gptbatch gptbatch-int8-cache --peers $(PEERS) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
