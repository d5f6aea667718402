PYTHON ?= python3
BIN := .venv/bin

MINUTES ?= 5

.PHONY: run test lint soak bench bench-scale clean
.DEFAULT_GOAL := help

help:
	@echo "make run    the whole thing on an embedded server, with a simulated exchange and Apply Layer"
	@echo "make test   lint, types and all tests"
	@echo "make soak   MINUTES=$(MINUTES) of simulated schedules, then as many of real processes under kills and cuts"
	@echo "make bench  the gate beside its floors: a table, and one JSON document; ARGS=--quick to see that it runs"
	@echo "make bench-scale  how it scales, drawn into docs/performance, in ten minutes; ARGS=--quick to see that it runs"
	@echo "make clean  remove .venv, caches and ./var"

.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install -q -e '.[all]' --group dev
	@touch $@

run: .venv/.stamp
	$(BIN)/governor demo $(ARGS)

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/coverage erase
	$(BIN)/pytest -n auto --dist loadfile --cov --cov-report=
	$(BIN)/coverage report --include='governor/decider.py,governor/gates.py,governor/machine.py,projections/*' --fail-under=100
	$(BIN)/coverage report

soak: .venv/.stamp
	$(BIN)/python -m tests.simulation --minutes $(MINUTES) --most 5
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

bench: .venv/.stamp
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-scale: .venv/.stamp
	$(BIN)/python -m tests.benchmarks.scale $(if $(findstring --quick,$(ARGS)),,--out docs/performance) $(ARGS)

clean:
	rm -rf .venv var .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
