# `make check` is what CI runs, in the environment of `make setup`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup check test slow lint types docs format constraints

setup:  # A pinned environment with the tools of development.
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt uv
	$(BIN)/uv pip install -q -p $(VENV) -c constraints.txt -e '.[dev]'

check: test lint types docs

test:
	$(BIN)/python -m pytest -n 2

slow:  # The tests that take minutes.
	$(BIN)/python -m pytest -m slow

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types:
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs:  # Into build/docs; a warning is an error.
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

format:
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints:  # Newest versions that pyproject.toml allows, for all Pythons.
	$(BIN)/uv pip compile -q pyproject.toml --all-extras --universal \
	  --upgrade --no-annotate --no-header -o constraints.txt
