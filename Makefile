# Needs Python 3.10 or newer and make; everything else is installed into $(VENV).
#
#   make demo    the embedded model in a tool-calling session, no download at run time
#   make test    the whole suite, offline
#   make soak    long runs of operations on sessions, SOAK_OPERATIONS of them
#   make check   format, lint, types
#   make wheel   build the wheel and try it in a fresh environment outside the checkout
#   make docs    rewrite the generated parts of the reference pages
#   make test-gpu   the tests that need a CUDA device

PYTHON ?= python3
VENV ?= .venv
# Installed first, so that the range in pyproject.toml never pulls another build of torch. Give
# another version, or pip options that name an index of CPU-only builds, in this variable.
TORCH_SPEC ?= torch==2.13.0
# Processes of the suite; each computes with one thread.
TEST_WORKERS ?= 2
# Processes of test-gpu: most of its time is compiling kernels on the host.
GPU_WORKERS ?= 6
SOAK_OPERATIONS ?= 1000
DEMO_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: demo test soak test-gpu check docs wheel clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/sfi-agent demo $(DEMO_ARGS)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

soak: $(INSTALLED_DEV)
	$(BIN)/python -m pytest tests/test_soak -n $(TEST_WORKERS) --soak-operations=$(SOAK_OPERATIONS) \
	    $(PYTEST_ARGS)

test-gpu: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m gpu -n $(GPU_WORKERS) $(PYTEST_ARGS)

check: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED_DEV)
	$(BIN)/python -m sfi_agent.cli.reference
	$(BIN)/python -m sfi_agent.cli.command_reference

wheel: $(INSTALLED_DEV)
	$(BIN)/python -m tests.wheel_job --torch "$(TORCH_SPEC)"

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps make a second run quick; a change of the dependencies makes it install again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; set PYTHON=...") \
	    if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH_SPEC)
	$(PIP_INSTALL) --editable .
	touch $@

# Of trl only the published chat templates are wanted, which the tests read as files; of what xgrammar
# asks for, not Triton, which is large and of no use without a GPU. Without them tests are skipped.
$(INSTALLED_DEV): $(INSTALLED)
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps trl==1.16.0 xgrammar==0.2.8 apache-tvm-ffi
	touch $@
