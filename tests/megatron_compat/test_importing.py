"""megatron-core imported by a rank: no compiler on a machine without a GPU, Megatron's own functions with one."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPORTS = """
import gc
import sys

import torch

torch.cuda.is_available = lambda: {gpu}
compiling = torch.compile
from eapo_megatron.megatron_compat.importing import import_megatron

import_megatron()
{more}
from megatron.core.fusions.fused_bias_swiglu import swiglu

assert torch.compile is compiling
assert gc.isenabled()
print("torch._inductor" in sys.modules, hasattr(swiglu, "_torchdynamo_orig_callable"))
"""


@pytest.mark.parametrize(("gpu", "more"), [(False, "import eapo_megatron.training.loop"), (True, "")])
def test_megatron_compiles_its_functions_where_there_is_a_gpu(gpu: bool, more: str) -> None:
    imports = IMPORTS.format(gpu=gpu, more=more)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", imports], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(gpu), str(gpu)]
