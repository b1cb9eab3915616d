# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# PYTHON=... chooses the interpreter that makes the virtual environment, VENV=... its folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST ?= .venv-oldest
# One thread a test process: threads of several processes on few cores wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 WANDB_MODE=offline MPLBACKEND=Agg
WORKERS ?= 2

.PHONY: demo test test-ci test-fast test-oldest lint format docs bench release-check clean

demo: $(STAMP)  ## shape bias, a training with the one line, three methods over three seeds: one page
	$(BIN)/python -m experiments.quickstart

test: $(STAMP)  ## all tests but the few of `make test-ci`
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not ci"

test-ci: $(STAMP)  ## the dozen longest: notebooks, wheel, processes, a whole library of optimizers
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m ci

test-fast: $(STAMP)  ## all tests but those that start processes or train for long
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not ci"

test-oldest: $(OLDEST)/.installed  ## core and integrations with the lowest versions that are allowed
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -m "not slow and not ci" tests/spectra tests/layers \
		tests/measure tests/assign tests/balance tests/optim tests/integrations

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tempbalance experiments benchmarks

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the site, from docs/ and the docstrings, into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -q -E -W --keep-going docs docs/_build/html

bench: $(STAMP)  ## every speed that is claimed, measured again: docs/benchmarks.md
	$(BIN)/python -m benchmarks.all

# --beside-torch spares the download of torch, at the price of an environment that is not fresh.
release-check: $(STAMP)  ## build sdist and wheel into dist/, check both, try the wheel alone
	$(BIN)/python tests/archives.py $(RELEASE_CHECK)

# torch and torchvision together and plainly: a CPU-only torch may not fit torchvision.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# In an environment of its own. numpy below 2.3 is what torch 2.4 was built for; Lightning 2.4 takes
# pkg_resources from setuptools, which has none from 81 on.
$(OLDEST)/.installed: pyproject.toml Makefile
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet 'torch==2.4.*' 'numpy<2.3' \
		'setuptools<81' 'pytorch-lightning==2.4.*' 'transformers==4.48.*' 'accelerate==1.0.*' \
		'peft==0.17.*' pytest pytest-timeout hypothesis
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
