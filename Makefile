# Everything runs inside .venv, which `make` builds when it is missing or when its recipe changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
CODE := traces sim real analysis moetwin.py tests $(wildcard benchmarks examples)

.PHONY: help demo test fuzz lint format clean $(VENV)

help: ## show this list
	@grep -hE '^[.a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([.a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: $(STAMP) ## run the whole twin on the small model, and say where the report is
	@$(BIN)/moetwin demo --force

test: lint ## lint, type-check, and run every test with coverage
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term

fuzz: $(STAMP) ## try the laws on examples that no run has seen, until interrupted
	while $(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=fuzz -n auto --dist worksteal; do :; done

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code as ruff would have it
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean: ## remove the environment and everything that builds and tests leave behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find traces sim real analysis tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: PYTHON must be Python 3.11 or newer, got $$($(PYTHON) --version 2>&1)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(PIP) install -c constraints.txt $(TORCH)
	@$(PIP) install -c constraints.txt -e ".[cluster,dev]"
	@touch $@
