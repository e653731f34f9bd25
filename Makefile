# `make help` lists the targets. Everything runs inside VENV, which is made on first use and brought up to date when
# pyproject.toml or constraints.txt change.
#
# On Linux, PyPI's torch brings several gigabytes of CUDA libraries. For the CPU build:
#   make demo PIP_FLAGS="--extra-index-url <the index of torch CPU builds>"

VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
# a file's tests share what they compile, so that they stay in one process; tests/conftest.py orders the files
TEST_WORKERS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
RESOLUTION.lowest := lowest-direct
RESOLUTION.highest := highest
BOUNDS_FLAGS ?=
BOUNDS_TESTS ?= tests/test_start.py tests/test_sampling.py tests/test_capture.py tests/test_parties.py
PROTO_OUT ?= .
DOCS_OUT ?= site

BIN := $(VENV)/bin
STAMP := $(VENV)/.unseen-installed
PROTOS := $(wildcard proto/*.proto)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast lowest highest lint format types docs proto proto-check hooks clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unseen needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[demo,dev]'
	@touch $@

setup: $(STAMP) ## Make the virtual environment and install unseen in it, with pinned dependencies

demo: $(STAMP) ## Run the demonstration
	$(BIN)/unseen demo $(DEMO_ARGS)

test: $(STAMP) ## Run every test, slow ones too
	$(BIN)/pytest $(TEST_WORKERS) $(PYTEST_ARGS)

test-fast: $(STAMP) ## Run the tests that are not marked slow
	$(BIN)/pytest -m 'not slow' $(TEST_WORKERS) $(PYTEST_ARGS)

lowest: ## Run a few tests with the lowest versions that pyproject.toml allows, in an environment of their own
highest: ## The same with the highest versions
lowest highest:
	test -x .$@/bin/uv || ($(PYTHON) -m venv .$@ && .$@/bin/python -m pip install $(PIP_FLAGS) uv)
	.$@/bin/uv pip install -p .$@/bin/python --upgrade --resolution $(RESOLUTION.$@) $(BOUNDS_FLAGS) -r pyproject.toml
	.$@/bin/python -c 'import unseen, parties.deployments'
	.$@/bin/uv pip install -p .$@/bin/python --upgrade --resolution $(RESOLUTION.$@) $(BOUNDS_FLAGS) -r pyproject.toml --extra demo
	.$@/bin/uv pip install -p .$@/bin/python $(BOUNDS_FLAGS) pytest pytest-timeout hypothesis
	.$@/bin/python -m pytest -m 'not slow' -W default -p no:cacheprovider $(BOUNDS_TESTS)

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Fix what can be fixed, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types
	$(BIN)/mypy

docs: $(STAMP) ## Build the documentation site into DOCS_OUT (site/)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir $(abspath $(DOCS_OUT))

proto: $(STAMP) ## Regenerate the gRPC stubs in parties/proto/ from proto/*.proto
	$(BIN)/python -m grpc_tools.protoc -I parties/proto=proto --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) --grpc_python_out=$(PROTO_OUT) $(PROTOS)

proto-check: $(STAMP) ## Check that the gRPC stubs are up to date
	@set -e; out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(MAKE) --no-print-directory -s proto PROTO_OUT="$$out"; \
	for new in "$$out"/parties/proto/*; do \
	  cmp -s "$$new" "parties/proto/$${new##*/}" || { echo "parties/proto/$${new##*/} is out of date: run 'make proto'" >&2; exit 1; }; \
	done

hooks: $(STAMP) ## Install the pre-commit hooks
	$(BIN)/pre-commit install

clean: ## Remove the virtual environment, caches and build output
	rm -rf .venv .lowest .highest build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
