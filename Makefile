# Everything a developer does, by name.  Needs make, a Python 3.11 or 3.12, and the default package index; no GPU.
# Arguments for a command go into ARGS: `make demo ARGS="--image cat.png --question 'What is this?'"`.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
# Tried in this order; the first that is 3.11 or 3.12 wins.
PYTHONS ?= python3.11 python3.12 python3 python
ARGS ?=
# A machine with a GPU has its own PyTorch; nothing is installed there.
GPU_PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup constraints test test-all test-models lint fix docs wheel-check demo bench bench-quick bench-capacity bench-sharing bench-policies fidelity judge soak real-model gpu-check gpu-e2e gpu-bundle clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install everything, pinned: about 11 GB; instant when nothing changed

$(STAMP): pyproject.toml constraints.txt | $(BIN)/uv
	@echo "installing into $(VENV): about 11 GB on disk with PyTorch, SGLang and their dependencies"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

# A Python without ensurepip (Debian's without python3-venv) still makes an empty environment, which its pip can fill.
$(BIN)/uv:
	@for python in $(PYTHONS); do \
	  $$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || continue; \
	  echo "creating $(VENV) with $$($$python --version)"; \
	  if $$python -c 'import ensurepip' 2>/dev/null; then \
	    $$python -m venv --clear $(VENV); \
	    $(BIN)/python -m pip install --quiet --constraint constraints.txt uv; \
	  else \
	    $$python -m venv --clear --without-pip $(VENV); \
	    $$python -m pip --python $(BIN)/python install --quiet --constraint constraints.txt uv; \
	  fi; \
	  exit 0; \
	done; \
	echo "no Python 3.11 or 3.12 among: $(PYTHONS); name one with make PYTHONS=/path/to/python" >&2; exit 1

constraints: setup ## Write the versions in .venv to constraints.txt
	{ sed '/^[^#]/,$$d' constraints.txt; $(BIN)/uv pip freeze --quiet --python $(BIN)/python --exclude-editable | grep -v '^pip=='; } >$(VENV)/constraints.txt
	cp $(VENV)/constraints.txt constraints.txt

test: setup ## Run the tests that fit a few minutes on two cores
	VENV=$(VENV) scripts/run_tests.sh $(ARGS)

test-all: setup ## Run all tests, the slow ones too
	$(BIN)/python -m pytest $(ARGS)

test-models: setup ## Serve every architecture of docs/models.md with tiny weights: stock's tokens, memory, sharing
	$(BIN)/python -m models.matrix
	$(BIN)/python -m pytest tests/e2e/test_matrix.py tests/e2e/test_models.py tests/sglang_hooks/test_attention_kinds.py $(ARGS)

lint: setup ## Check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup ## Let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## Build the documentation as a site, in out/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

wheel-check: setup ## Build sdist and wheel, install the wheel in an empty environment, run the quick start (FULL=1: 11 GB)
	VENV=$(VENV) scripts/check_wheel.sh

demo: setup ## Serve the bundled model compressed to 10 % and in full, ask, compare; installs about 11 GB the first time
	$(BIN)/vlcache demo $(ARGS)

bench: setup ## Measure speed against stock SGLang; writes benchmarks/results/
	$(BIN)/python benchmarks/run.py speed $(ARGS)

bench-quick: setup ## The same in a few minutes, to see that it runs; writes to out/
	$(BIN)/python benchmarks/run.py speed --quick $(ARGS)

bench-capacity: setup ## Measure how many users fit beside stock SGLang in equal memory; writes benchmarks/results/
	$(BIN)/python benchmarks/run.py capacity $(ARGS)

bench-sharing: setup ## Ask several questions about each image, four ways to share; writes docs/sharing.md
	$(BIN)/python benchmarks/run.py questions $(ARGS)

bench-policies: setup ## Ask one question per image under every policy; writes docs/policies-measured.md
	$(BIN)/python benchmarks/run.py policies $(ARGS)

fidelity: setup ## Count right answers under every policy and budget; goes on where it stopped; writes docs/fidelity.md
	$(BIN)/python benchmarks/run.py fidelity $(ARGS)

judge: setup ## Ask a real pretrained language model under every policy and budget; goes on where it stopped; writes docs/fidelity.md
	$(BIN)/python -m benchmarks.judge $(ARGS)

soak: setup ## Abuse one server for 20 minutes, then check its books, answers and memory
	$(BIN)/python benchmarks/run.py soak $(ARGS)

gpu-check: ## Check and time the kernels on a CUDA device; needs torch, triton and pytest, no .venv and no network
	$(GPU_PYTHON) -m benchmarks.gpu.check $(ARGS)

gpu-bundle: setup ## Write out/gpu-bundle: all checks of a GPU in a folder of 60 MB at most that needs only PyTorch, Triton and pytest there
	$(BIN)/python -m benchmarks.bundle.build $(ARGS)

gpu-e2e: ## Time whole servers on a CUDA device, budget 1.0 against 0.1; GPU_PYTHON needs SGLang and this package
	$(GPU_PYTHON) -m benchmarks.gpu.e2e $(ARGS)

real-model: setup ## Build a pretrained 135 M model, for text and for images, in out/smollm2; instant when it is there
	$(BIN)/python -m models.smollm2.build $(ARGS)

clean: ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build out
