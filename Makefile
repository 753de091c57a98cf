PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup train test test-nemo lint benchmark

setup: .venv/.installed

train: setup
	$(BIN)/eapo-megatron train recipes/eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml

test: setup lint
	$(BIN)/pytest

test-nemo: .venv-nemo/.installed
	PYTHONPATH=. .venv-nemo/bin/python -m pytest tests/integrations

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: setup
	$(BIN)/python -m benchmarks.vocab_parallel

.venv/.installed: setup.py constraints/cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints/cpu.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints/cpu.txt -e '.[train,dev]'
	touch $@

.venv-nemo/.installed: constraints/nemo.txt
	$(PYTHON) -m venv .venv-nemo
	.venv-nemo/bin/pip install --quiet --no-deps -r constraints/nemo.txt
	touch $@
