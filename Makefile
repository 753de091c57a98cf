PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

$(VENV)/.installed: setup.py constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints/cpu.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints/cpu.txt -e '.[train,dev]'
	touch $@

setup: $(VENV)/.installed

.PHONY: setup
