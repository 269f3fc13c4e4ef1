# shoal: every target does the set-up it needs; a second call is instant. `make` alone prints this list.
.DEFAULT_GOAL := help
.PHONY: help env demo test lint format check bench constraints clean
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
INTEROP := $(VENV)/.interop
INPUTS := pyproject.toml constraints.txt scripts/env.sh
ARGS ?=

help: ## this list
	@echo 'shoal: make demo and make test are all that a fresh clone needs (Linux, Python 3.11 or newer).'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1 \2/p' $(MAKEFILE_LIST) | awk '{c = $$1 " " $$2; $$1 = $$2 = ""; printf "  %-18s%s\n", c, $$0}'
	@echo 'ARGS="..." is passed on:  make demo ARGS="--rounds 20 --no-kill"   make test ARGS="tests/protocol -q"'
	@echo 'PYTHON=python3.12 make env  chooses the interpreter; CONTRIBUTING.md says how to get a CPU-only torch.'

env: $(READY) ## make .venv with the pinned dependencies (PYTHON=… chooses the interpreter)
	@echo 'make env: $(VENV) is ready'

demo: $(READY) ## train a small model across five local peers, kill one, compare with one machine
	@$(BIN)/shoal demo $(ARGS)

# The simulation is deterministic and only computes, so it may share the cores; real processes get them for themselves.
test: $(READY) $(INTEROP) ## run the whole test suite
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m pytest tests/simulation --matrix shapes -n auto
	@$(BIN)/python -m pytest --ignore tests/simulation
else
	@$(BIN)/python -m pytest $(ARGS)
endif

lint: $(READY) ## ruff, mypy and the import-direction linter
	@VENV=$(VENV) scripts/lint.sh

format: $(READY) ## let ruff rewrite what it can
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

check: lint test ## lint and test

bench: $(READY) ## benchmarks against the one-machine reference
	@$(BIN)/python -m benchmarks $(ARGS)

constraints: ## pin the newest set of dependencies that works (rewrites constraints.txt)
	@scripts/constraints.sh $(PYTHON)

clean: ## remove .venv and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find shoal tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

$(READY): $(INPUTS)
	@VENV=$(VENV) PYTHON=$(PYTHON) scripts/env.sh base
	@touch $@

$(INTEROP): $(READY)
	@VENV=$(VENV) PYTHON=$(PYTHON) scripts/env.sh interop
	@touch $@
