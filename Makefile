# Two commands: `make course` runs the course, `make test` runs everything that CI runs.
# Both set up `.venv` first, do nothing again that is already done, and can be repeated after a Ctrl-C.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := $(shell sed -n 's/^\(torch==.*\)/\1/p' requirements.lock)
JOBS   ?= 2

# The network is not needed after `setup`; tools that would look for it are told so.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup course test test-fast lab lint browser clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@echo "Setting up $(VENV): about three minutes and 3 GB (more where torch brings its CUDA libraries)."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --progress-bar off $(TORCH)
	@$(BIN)/python -m pip install --quiet --progress-bar off -r requirements.lock
	@$(BIN)/python -m pip install --quiet --progress-bar off --no-deps --editable .
	@touch $@

setup: $(STAMP)  ## the environment in .venv, from requirements.lock

course: setup  ## every notebook that is there, and a table of what it claimed and measured
	@$(BIN)/course run --jobs $(JOBS)

test: setup browser lint  ## the whole suite, exactly what CI runs
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/unit tests/integration tests/faults
	@PYTHONPATH=$(CURDIR)/tests/sealed $(BIN)/course run --jobs $(JOBS)
	@$(BIN)/python -m pytest tests/notebooks tests/browser

test-fast: setup lint  ## unit tests only, under three minutes
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow" tests/unit

lab: setup  ## JupyterLab, open at week 1
	@$(BIN)/jupyter lab --ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/phase1-fundamentals/week1-attention/01_attention_mechanisms.ipynb

lint: setup  ## ruff and the rule that a module imports only from below
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }

browser:  # Chromium for the one test that needs it; installed only where this user may
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium >/dev/null; \
	  else echo "No Chromium found: the browser test will be skipped (Debian: apt-get install chromium)."; fi; }

clean:  ## remove the environment and everything the course has built
	rm -rf $(VENV) artifacts .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
