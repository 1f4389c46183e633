# make demo    distil the bundled digits teacher into one step (a new folder under runs/ every time)
# make ci      lint, types and tests: what .ci/run runs
# Other interpreters and environments: make PYTHON=python3.12 VENV=/tmp/venv ...
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo venv test slow lint types ci

demo: $(READY)
	$(BIN)/stepdistill distill --config digits_sid output_dir=runs/demo_$$(date +%Y%m%d_%H%M%S)

venv: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[test]"
	touch $@

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow"

slow: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m slow

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

ci: lint types test
