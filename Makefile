# `make check` is what CI runs, in the environment of `make setup`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup check test slow lint types format constraints

setup:  # A pinned environment with the tools of development.
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt uv
	$(BIN)/uv pip install -q -p $(VENV) -c constraints.txt -e '.[dev]'

check: test lint types

test:
	$(BIN)/python -m pytest -n 2

slow:  # The tests that take minutes.
	$(BIN)/python -m pytest -m slow

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types:
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format:
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints:  # Newest versions that pyproject.toml allows, for all Pythons.
	$(BIN)/uv pip compile -q pyproject.toml --all-extras --universal \
	  --upgrade --no-annotate --no-header -o constraints.txt
