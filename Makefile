# make quickstart: the real trainer on a small task, on a CPU.  make demo: the rule on a recorded batch.
# make quickstart-lm: the same with a real language model, SmolLM2-135M.
# make test: before every change.  make test-all: what else there is, without vLLM.  Each sets up .venv on a fresh machine.
# make test-vllm: the trainer with vLLM for CPUs, in .venv-vllm (make vllm); docs/tested.md says what for. CI runs all three.
# make test-gpu ARGS="--model FOLDER": what to run first on a GPU, a line a check; not run by CI, which has none.
# PYTHON=python3.12: with another interpreter.  LATEST=1: with the newest versions instead of those of constraints.txt.
# Each gets an environment of its own, .venv-3.12 or .venv-latest.
PYTHON ?= python3
LATEST ?=
# A CUDA build, a CPU build: whatever your index serves under this name. Installed first, so that nothing pulls another.
TORCH ?= torch
VERSION := $(if $(filter file,$(origin PYTHON)),,-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
VENV := .venv$(VERSION)$(if $(LATEST),-latest)
# Versions of veRL that patches/ is for: their wheels are unpacked, patched and tested.
PATCHED := 0.8.0 0.9.1
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm$(if $(LATEST),-latest)
# Of what is installed there: where it changes, the environment is made anew.
VLLM_HASH := $(shell cat setup.cfg tests/vllm_cpu/*.txt tests/vllm_cpu/stand_ins/*/*.toml tests/vllm_cpu/stand_ins/*/*.py | cksum | cut -d ' ' -f 1)

# Without compiling all modules beforehand, which takes minutes: those that are imported are compiled then, and kept,
# also in a container whose image forbids it.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := -m pip install --quiet --no-compile
CONSTRAINED := $(INSTALL) $(if $(LATEST),--upgrade,--constraint constraints.txt)

# For example: make quickstart ARGS="--loss gspo --steps 40"; make test ARGS="tests/rule/test_similarity.py"
ARGS ?=
# Test processes. More than cores make nothing faster; each takes up to 2 GB.
JOBS ?= 2

.PHONY: quickstart quickstart-compare quickstart-lm quickstart-lm-compare demo test test-all test-vllm test-gpu vllm lint benchmark constraints clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart/run.py $(ARGS)

quickstart-compare: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart/compare.py $(ARGS)

quickstart-lm: $(VENV)/.quickstart-lm
	$(BIN)/python examples/quickstart_lm/run_lm.py $(ARGS)

quickstart-lm-compare: $(VENV)/.quickstart-lm
	$(BIN)/python examples/quickstart_lm/compare_lm.py $(ARGS)

demo: $(VENV)/.core
	$(BIN)/python examples/recorded_batch/demo.py

test: lint
	$(BIN)/python -m pytest -m "not long" --numprocesses $(JOBS) --dist worksteal $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m long $(ARGS)

vllm: $(VLLM_VENV)/.$(VLLM_HASH)

test-vllm:
	@if $(MAKE) vllm; then \
	  $(VLLM_VENV)/bin/python $(INSTALL) --no-deps --editable . && $(VLLM_VENV)/bin/python -m pytest tests/vllm_cpu $(ARGS); \
	else \
	  echo "test-vllm: SKIPPED: vLLM for CPUs cannot be installed here, the reason stands above"; \
	fi

# In the environment that you train in, which nothing here changes.
test-gpu:
	$(PYTHON) tests/gpu/first_run.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=recipes/multimodal_search $(BIN)/mypy --package search_agent

benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

# Keeps the versions that constraints.txt names, and adds what is missing; with LATEST=1 all become the newest.
constraints: $(VENV)/.dev
	$(BIN)/python $(INSTALL) uv
	$(BIN)/uv pip compile setup.cfg --extra dev --universal --python-version 3.10 --quiet --no-annotate \
	  --custom-compile-command "make constraints" $(if $(LATEST),--upgrade) --output-file constraints.txt

$(VENV)/.core: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "verl-tapo needs Python 3.10 to 3.12 (veRL does): make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --upgrade pip
	$(BIN)/python $(CONSTRAINED) "$(TORCH)"
	$(BIN)/python $(CONSTRAINED) --editable .
	touch $@

$(VENV)/.quickstart: $(VENV)/.core
	$(BIN)/python $(CONSTRAINED) --editable '.[quickstart]'
	touch $@

$(VENV)/.quickstart-lm: $(VENV)/.quickstart
	$(BIN)/python $(CONSTRAINED) --editable '.[quickstart-lm]'
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python $(CONSTRAINED) --editable '.[dev]'
	for version in $(PATCHED); do $(BIN)/python -m pip download --quiet --no-deps --dest $(VENV)/wheels verl==$$version || exit 1; done
	touch $@

$(VLLM_VENV)/.$(VLLM_HASH):
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python $(INSTALL) --upgrade pip
	$(VLLM_VENV)/bin/python $(CONSTRAINED) "$(TORCH)"
	$(VLLM_VENV)/bin/python $(INSTALL) $(if $(LATEST),--upgrade,--constraint tests/vllm_cpu/constraints.txt) --requirement tests/vllm_cpu/requirements.txt
	touch $@

clean:
	rm -rf .venv* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
