# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv first, once.
PYTHON ?= python3
BIN := .venv/bin

# What demo.sh makes in demo/.
DEMO := images shards run views.png neighbours.png .made_by_make_demo

.PHONY: install demo test check lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "== installing into .venv (once; about 7 GB with CUDA libraries, a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The fast lane while working: everything but the tests that start processes. One thread for each of the two
# workers: with more, they wait for each other's threads.
check: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not process"

test: install lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh

# Only what these commands made: runs/ and shards/ are yours.
clean:
	if [ -e .venv/installed ]; then rm -rf .venv; fi
	if [ -e demo/.made_by_make_demo ]; then cd demo && rm -rf $(DEMO); fi
