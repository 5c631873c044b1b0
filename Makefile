# make quickstart: the real trainer on a small task, on a CPU.  make demo: the rule on a recorded batch.
# make test: everything CI runs.  Each sets up .venv on a fresh machine.
PYTHON ?= python3
# A CUDA build, a CPU build: whatever your index serves under this name. Installed first, so that nothing pulls another.
TORCH ?= torch==2.13.0
VENV := .venv
# Versions of veRL that patches/ is for: their wheels are unpacked, patched and tested.
PATCHED := 0.8.0 0.9.1
BIN := $(VENV)/bin

# For example: make quickstart ARGS="--loss gspo --steps 40"
ARGS ?=

.PHONY: quickstart quickstart-compare demo test lint benchmark clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart/run.py $(ARGS)

quickstart-compare: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart/compare.py $(ARGS)

demo: $(VENV)/.core
	$(BIN)/python examples/recorded_batch/demo.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=recipes/multimodal_search $(BIN)/mypy --package search_agent

benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

$(VENV)/.core: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "verl-tapo needs Python 3.10 to 3.12 (veRL does): make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.quickstart: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[quickstart]'
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	for version in $(PATCHED); do $(BIN)/python -m pip download --quiet --no-deps --dest $(VENV)/wheels verl==$$version || exit 1; done
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
