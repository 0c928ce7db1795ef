# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv first, once.
PYTHON ?= python3
BIN := .venv/bin

# Names of all that demo.sh makes in demo/.
DEMO := images shards run views.png neighbours.png report.html .made_by_make_demo

# CUDA=12 or CUDA=13: the builds of torch and DALI. Left out: those that are in .venv, or else those that the driver
# runs, or else 13.
INSTALLED := $(if $(wildcard .venv/installed),$(or $(shell cat .venv/installed),13))
DRIVER := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA [A-Za-z ]*Version: *\([0-9]*\)\..*/\1/p' | head -n 1)
CUDA ?= $(or $(INSTALLED),$(if $(filter 12,$(DRIVER)),12,13))
INDEX_12 := --extra-index-url https://download.pytorch.org/whl/cu126

.PHONY: install demo test check lint clean other-cuda

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt constraints-cuda$(CUDA).txt $(if $(filter-out $(CUDA),$(INSTALLED)),other-cuda)
	@echo "== installing into .venv for CUDA $(CUDA) (once; about 7 GB with CUDA libraries, a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints-cuda$(CUDA).txt $(INDEX_$(CUDA)) --editable ".[dev,cuda$(CUDA)]"
	@echo $(CUDA) > $@

constraints-cuda%.txt:
	$(error CUDA=$(CUDA): there is CUDA=12 and CUDA=13)

# DALI's two builds put their files into the same folder: neither may be left of the other.
other-cuda:
	@echo "== .venv has the builds for CUDA $(INSTALLED): removing it"
	rm -rf .venv

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The fast lane while working: everything but the tests that start processes or take long. One thread for each of the
# two workers, here and below: with more, they wait for each other's threads.
check: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --fast

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh

# Only what these commands made: runs/ and shards/ are yours.
clean:
	if [ -e .venv/installed ]; then rm -rf .venv; fi
	if [ -e demo/.made_by_make_demo ]; then cd demo && rm -rf $(DEMO); fi
