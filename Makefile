PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup train test lint benchmark

setup: .venv/.installed

train: setup
	$(BIN)/eapo-megatron train recipes/eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml

test: setup lint
	$(BIN)/pytest

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
