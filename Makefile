# Every target sets up what it needs. Continuous integration calls the same ones (.ci/run).
#   make demo    build nybble, fetch a small model, answer a prompt with it
#   make test    the test-suite          make check   lint, types, formatting, structure
#   make bench   measure this machine    make clean   remove what was built here

VENV := .venv
BIN := $(VENV)/bin
# The first Python of 3.11 or later; PYTHON=... chooses another one.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
NATIVE := $(shell find native -name '*.h' -o -name '*.cpp')
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL ?= smollm2:135m
PROMPT ?= Why is the sky blue? Answer in two sentences.

.PHONY: venv demo test check bench clean
.DELETE_ON_ERROR:

venv: $(VENV)/.base

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: nybble needs Python 3.11 or later, and none was found" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Editable: Python files are used where they are, the native core is built again when one of its files changes.
$(VENV)/.base: $(BIN)/python pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

# Holds the base as well: going through .base would build the native core twice.
$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.base $@

demo: $(VENV)/.base
	$(BIN)/nybble run $(MODEL) "$(PROMPT)" --temperature 0 --max-tokens 96 --verbose

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/python -m pytest -q tests/test_import_direction.py tests/test_file_sizes.py

bench: $(VENV)/.base
	$(BIN)/nybble doctor
	$(BIN)/nybble bench $(MODEL) -b 1,8,32 --json

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
