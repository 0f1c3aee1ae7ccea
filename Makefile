# Every target makes its own virtual environment in .venv and installs what it needs; nothing else is touched.
# PYTHON may name the interpreter (3.11 or newer).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
ROWS ?=
JOBS ?= 2000
FAULTS ?= 100
SEED ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo up test check bench chaos clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(VENV)/.worker  ## render a batch of prompts and a row of GAN images, ends with a contact sheet
	$(BIN)/imagefarm demo

up: $(VENV)/.worker  ## start a farm on this machine (Ctrl-C stops it)
	$(BIN)/imagefarm up

test: check  ## everything that must hold: linters, types, import rules, tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(VENV)/.test  ## linters, types and import rules only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .import_linter_cache

bench: $(VENV)/.test  ## measure beside the baselines: make bench ROWS=a5,c (all rows without ROWS)
	$(BIN)/python -m benchmarks $(ROWS)

chaos: $(VENV)/.test  ## kill everything at random and prove that no job is lost: make chaos JOBS=2000 FAULTS=100 SEED=1
	$(BIN)/python -m tests.chaos --jobs $(JOBS) --faults $(FAULTS) --seed $(SEED)

clean:  ## remove the virtual environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "imagefarm needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.worker: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing imagefarm with its engines into $(VENV) (once; some minutes) …"
	$(PIP) -e '.[worker]'
	@touch $@

$(VENV)/.test: $(VENV)/.worker
	@echo "installing the tools for tests and benchmarks into $(VENV) …"
	$(PIP) -e '.[worker,test]'
	@touch $@
