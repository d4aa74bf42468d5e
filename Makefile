# Each target makes the virtual environment first if it is missing; nothing else has to be installed by hand.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := runs/demo
MERGEKIT_VENV := .venv-mergekit

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-slow test-postgres test-gpu test-faults lint docs zoo check-large bench-setup bench-merge bench-scoring bench-fidelity bench-overhead bench-search bench-paths clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## make the virtual environment

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,postgres,dashboard]"
	touch $(STAMP)

demo: $(STAMP)  ## search the demo zoo, then print the front with its test scores
	$(BIN)/evomerge search zoo/demo.yaml
	$(BIN)/evomerge front $(DEMO) --split test
	$(BIN)/evomerge status $(DEMO)

test: $(STAMP) lint  ## the tests that must pass everywhere (under 10 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not faults" tests

test-slow: $(STAMP)  ## the long proofs
	$(BIN)/python -m pytest -m slow tests

test-postgres: $(STAMP)  ## against a PostgreSQL server: EVOMERGE_TEST_POSTGRES=postgresql+psycopg://user@host/db
	$(BIN)/python -m pytest -m postgres tests

test-faults: $(STAMP)  ## every fault test, long ones and both databases included
	$(BIN)/python -m pytest -n 2 --dist load tests/faults tests/test_leases.py tests/test_spool.py tests/test_pool.py tests/test_ray_pool.py

test-gpu: $(STAMP)  ## on a machine with CUDA
	$(BIN)/python -m pytest -m gpu tests

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## docs/methods.md from the methods' own files
	$(BIN)/python -m evomerge.catalogue > $(VENV)/methods.md
	mv $(VENV)/methods.md docs/methods.md

zoo: $(STAMP)  ## train the demo zoo again, from nothing
	$(BIN)/python -m zoo.data
	$(BIN)/python -m zoo.train

check-large: $(STAMP)  ## the same commands on a 125M-parameter random Llama (base and 3 experts, sharded bf16)
	$(BIN)/python benchmarks/check_large.py

bench-setup: $(MERGEKIT_VENV)/.installed  ## mergekit in an environment of its own, to compare with

$(MERGEKIT_VENV)/.installed: constraints.txt
	test -x $(MERGEKIT_VENV)/bin/python || $(PYTHON) -m venv $(MERGEKIT_VENV)
	$(MERGEKIT_VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(MERGEKIT_VENV)/bin/python -m pip install --quiet --constraint constraints.txt mergekit==0.1.5
	touch $(MERGEKIT_VENV)/.installed

bench-merge: $(STAMP) bench-setup  ## seconds per merged candidate, beside a plain copy and mergekit: BENCH="--methods ties"
	$(BIN)/python benchmarks/merge_speed.py $(BENCH)

bench-scoring: $(STAMP)  ## seconds per scored candidate, beside its forward passes and lm-eval: BENCH="--only zoo"
	$(BIN)/python benchmarks/scoring_speed.py $(BENCH) 2>$(VENV)/bench-scoring.log

bench-fidelity: $(STAMP)  ## what rungs save, and how often they lose the winner
	$(BIN)/python benchmarks/fidelity.py $(BENCH)

bench-overhead: $(STAMP)  ## time and memory of each optimizer's own work per candidate: BENCH="--optimizers tpe"
	$(BIN)/python benchmarks/search_overhead.py $(BENCH)

bench-search: $(STAMP)  ## true scores of searches at equal numbers of items, beside other tools' settings: BENCH=--small
	$(BIN)/python benchmarks/search_efficiency.py --out runs/search-efficiency/results.json $(BENCH)

bench-paths: $(STAMP)  ## layer orders of the demo zoo, searched and random; what shared first layers save (BENCH="--only speed")
	$(BIN)/python benchmarks/data_flow.py $(BENCH)
	$(BIN)/python benchmarks/prefix_reuse.py

clean:  ## remove the virtual environments and all studies
	rm -rf $(VENV) $(MERGEKIT_VENV) $(filter-out runs/README.md,$(wildcard runs/*))
