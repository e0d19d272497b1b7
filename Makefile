# One command each:  make demo | make coverage | make test | make test-all | make covered | make lint | make types | make check
# VENV=DIR uses another virtual environment; PYTHON=python3.12 builds it with another interpreter; WORKERS=4 tests faster.

VENV ?= .venv
WORKERS ?= 2
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(RECENT)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.linearize-installed

.PHONY: help install demo coverage docs test test-all covered lint types check format clean

help:
	@sed -n 1,2p Makefile

install: $(STAMP)

# A stamp instead of the folder itself: an interrupted installation is repeated, a finished one is not.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "linearize needs Python 3.11 or newer; say: make PYTHON=/path/to/python3.11"; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"
	"$(PY)" -m pip install --disable-pip-version-check -e ".[all]"
	@touch "$@"

demo: $(STAMP)
	"$(PY)" benchmarks/demo.py

# Hours: every model of both zoos. Goes on where it stopped; delete benchmarks/coverage/results to start afresh.
coverage: $(STAMP)
	"$(PY)" -m pip install --disable-pip-version-check torch-pruning==1.6.1
	"$(PY)" -m benchmarks.coverage timm --families --time 600 --weights 1500 --memory 12
	"$(PY)" -m benchmarks.coverage timm --weights 1500 --memory 12
	"$(PY)" -m benchmarks.coverage timm --again --weights 3000 --memory 18 --time 600 --workers 1
	"$(PY)" -m benchmarks.coverage transformers
	"$(PY)" -m benchmarks.coverage torch-pruning
	"$(PY)" -m benchmarks.coverage report

# The pages as a site in build/site; strict: a link that leads nowhere is an error.
docs: $(STAMP)
	"$(PY)" -m pip install --disable-pip-version-check -e ".[docs]"
	"$(PY)" -m mkdocs build --strict

# One thread for each worker: the networks are tiny, and sums come out in the same order everywhere.
PYTEST := OMP_NUM_THREADS=1 "$(PY)" -m pytest -n $(WORKERS) --dist worksteal

# Some minutes: without whole models of the zoos, programs of benchmarks/ and what else takes long.
test: $(STAMP)
	$(PYTEST) -m "not slow and not zoo"

test-all: $(STAMP)
	$(PYTEST)

# Lines and branches that the tests run; half as long again as test-all.
covered: $(STAMP)
	$(PYTEST) --cov=linearize --cov-branch --cov-report= || echo "some tests failed: the counts hold all the same"
	"$(PY)" -m coverage json -q -o build/covered.json
	"$(PY)" -m benchmarks.covered build/covered.json

lint: $(STAMP)
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

types: $(STAMP)
	"$(PY)" -m mypy

check: lint types test-all

format: $(STAMP)
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

clean:
	rm -rf .venv build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
