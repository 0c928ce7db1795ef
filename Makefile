# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv first, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint clean

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

test: install lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh

clean:
	rm -rf .venv demo runs
