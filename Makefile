# `make check` is what CI runs, in the environment of `make setup`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# Extras that tests use and development does not need.
EXTRAS = opponents ray

.PHONY: setup extras check test slow lint types docs format constraints

setup:  # A pinned environment with the tools of development.
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt uv
	$(BIN)/uv pip install -q -p $(VENV) -c constraints.txt -e '.[dev]'

extras:  # One that this Python or system has no wheel for is left out.
	@for extra in $(EXTRAS); do \
	  $(BIN)/uv pip install -q -p $(VENV) -c constraints.txt -e ".[$$extra]" \
	    || echo "note: extra $$extra is not installed; its tests are skipped"; \
	done

check: test lint types docs

test:  # Ends with what was skipped, and why.
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
