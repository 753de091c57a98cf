"""Trainers and servers of vLLM as two groups of one job, with the real vLLM (the environment of `make test-vllm`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cluster import Cluster
from command_line import metrics
from test_jobs import ended

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes" / "eapo-qwen2-tiny-arithmetic-vllm-1n2g-tp2.yaml"
PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
SMALL = (
    "cluster.gpus_per_node=1",
    "parallel.tensor_model_parallel_size=1",
    "warm_start.steps=0",
    "train={steps: 2, num_prompts_per_step: 4, mini_batch_prompts: 2, micro_batch_size: 8}",
    "rollout.max_response_tokens=8",
    "evaluation.num_prompts=4",
    "rollout.vllm.placement=separate",
    "rollout.vllm.num_nodes=1",
)


def script(cluster: Cluster, *arguments: str) -> str:
    cluster.environment |= {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "eapo_megatron.cli", "submit", RECIPE, *SMALL, *arguments, "--dry-run"]
    return cluster.run(*command).stdout


def test_the_script_asks_for_both_groups(cluster: Cluster, work: Path) -> None:
    lines = script(
        cluster,
        "cluster={device: cuda, num_nodes: 2, gpus_per_node: 8}",
        "parallel.tensor_model_parallel_size=2",
        "rollout.vllm={num_nodes: 3, tensor_parallel_size: 4}",
        "--time=2:00:00",
    ).splitlines()
    header = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    trainers, servers = header[: header.index("hetjob")], header[header.index("hetjob") + 1 :]
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=2:00:00"} <= {*trainers}
    assert servers == ["--nodes=3", "--ntasks-per-node=2", "--gpus-per-task=4", "--time=2:00:00"]


@pytest.mark.skipif(not PYTHON.exists(), reason="vLLM has an environment of its own: make test-vllm")
def test_trains_beside_servers_on_other_nodes(cluster: Cluster, work: Path) -> None:
    cluster.environment |= {"PYTHONPATH": str(REPOSITORY), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [PYTHON, "-m", "eapo_megatron.cli", "submit", RECIPE, *SMALL, "name=het", "--cpus-per-task=2"]
    job = cluster.run(*command).stdout.split(",")[0].removeprefix("job ")
    fields = cluster.wait_for(job, ended, seconds=300)
    folder = work / "runs" / "het" / "slurm"
    logs = folder / f"{job}-logs" / "0"
    assert fields["JobState"] == "COMPLETED", (folder / f"{job}.log").read_text()
    assert "on node1, logs in" in (folder / f"{job}.log").read_text()
    assert "node2" in (logs / "server-0.log").read_text()
    assert [line["step"] for line in metrics(work / "runs" / "het")] == [0, 1, 2]
    assert all(line["rollout/log_prob_gap"] < 1e-4 for line in metrics(work / "runs" / "het", first_step=1))
    cluster.wait_for(job, lambda _: not cluster.run("squeue", "-h").stdout)
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _serves(int(pid))], "a server lives on"


def _serves(pid: int) -> bool:
    try:
        return (
            b"eapo-qwen2-tiny-arithmetic-vllm" in Path(f"/proc/{pid}/cmdline").read_bytes()
            and b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    except FileNotFoundError:
        return False
