# The two commands of the README. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The same environment with what the benchmarks compare with.
BENCH_READY := $(VENV)/.bench
# A second environment, in which the tests meet ArviZ 1.x.
ARVIZ1 := .venv-arviz1
ARVIZ1_READY := $(ARVIZ1)/.ready

.PHONY: demo test lint types bench clean

demo: $(READY)
	$(BIN)/vadd-pyro demo

test: $(READY) $(ARVIZ1_READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Writes the tables of docs/performance.md. Some parts only: make bench BENCH="--only speed"
bench: $(READY) $(BENCH_READY)
	$(BIN)/python benchmarks/suite.py $(BENCH)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

# NumPyro draws JAX, which nothing else needs. Without a network its columns stay as they are.
$(BENCH_READY): $(READY)
	@if $(BIN)/python -m pip install --quiet --retries 1 --constraint constraints.txt --editable ".[bench]"; \
	  then touch $(BENCH_READY); \
	  else echo "NumPyro could not be installed: the benchmarks run without it"; fi

# ArviZ 1.x wants Python 3.12 or later. Without one, or without a network, its test is skipped: a
# line says so, and the next make tries again.
$(ARVIZ1_READY): constraints-arviz1.txt
	@for python in python3.12 python3.13 python3.14 $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3 $(PYTHON); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || continue; \
	  rm -rf $(ARVIZ1); \
	  "$$python" -m venv $(ARVIZ1) && $(ARVIZ1)/bin/python -m pip install --quiet --retries 1 \
	    --constraint constraints-arviz1.txt "arviz>=1" h5netcdf h5py matplotlib 2>/dev/null \
	    && touch $(ARVIZ1_READY) && exit 0; \
	  rm -rf $(ARVIZ1); \
	done; \
	echo "ArviZ 1.x is not tested: its packages could not be installed with a Python 3.12 or later"

clean:
	rm -rf $(VENV) $(ARVIZ1) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
