"""NeMo recipes: what NeMo-Run is given, and a run of the arithmetic recipe through its local executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nemo_run as run
import pytest

from eapo_megatron.config import RecipeError
from eapo_megatron.integrations.nemo_run import eapo_recipe, local_executor, slurm_executor, train

ROOT = Path(__file__).parents[2]
ARITHMETIC = str(ROOT / "recipes" / "eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml")
ON_TWO_NODES = ["cluster.num_nodes=2", "cluster.gpus_per_node=8", "cluster.device=cuda"]


def test_a_recipe_is_a_partial_of_its_file_and_overrides() -> None:
    task = eapo_recipe(ARITHMETIC, ["train.steps=3"])
    assert task == run.Partial(train, recipe=ARITHMETIC, overrides=["train.steps=3"])


def test_a_wrong_recipe_is_refused_before_it_is_launched() -> None:
    with pytest.raises(RecipeError, match=r"train\.stepss: unknown key"):
        eapo_recipe(ARITHMETIC, ["train.stepss=3"])


def test_executors_read_the_cluster_section() -> None:
    local = local_executor(ARITHMETIC)
    assert (local.ntasks_per_node, local.nnodes()) == (2, 1)
    with pytest.raises(RecipeError, match=r"cluster\.num_nodes is 2"):
        local_executor(ARITHMETIC, ON_TWO_NODES)
    slurm = slurm_executor(ARITHMETIC, ON_TWO_NODES, account="research", container_image="eapo.sqsh", partition="gpu")
    assert (slurm.nodes, slurm.ntasks_per_node, slurm.gpus_per_node) == (2, 8, 8)
    assert (slurm.account, slurm.partition, slurm.container_image) == ("research", "gpu", "eapo.sqsh")
    assert slurm_executor(ARITHMETIC, account="research", container_image="eapo.sqsh").gpus_per_node is None


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # NeMo-Run calls torchrun by its name
        "PYTHONPATH": str(ROOT),
        "NEMORUN_HOME": str(folder / "nemo_run"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "recipes" / "nemo" / "launch.py"), ARITHMETIC, *arguments]
    return subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_local_executor_trains(tmp_path: Path) -> None:
    done = launch(
        tmp_path,
        "train.steps=1",
        "train.num_prompts_per_step=8",
        "train.mini_batch_prompts=8",
        "warm_start.steps=2",
        "data.arithmetic.held_out_size=8",
        "logging.tensorboard=false",
        f"logging.run_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = (tmp_path / Path(ARITHMETIC).stem / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] == 1


def test_slurm_gets_nodes_and_ranks(tmp_path: Path) -> None:
    done = launch(tmp_path, *ON_TWO_NODES, "--account", "research", "--image", "eapo.sqsh", "--dryrun")
    assert done.returncode == 0, done.stderr[-3000:]
    script = " ".join(done.stdout.split())
    for part in ("#SBATCH --account=research", "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "--nproc-per-node 8"):
        assert part in script
