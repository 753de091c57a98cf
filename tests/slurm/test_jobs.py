"""train.sbatch on a real cluster: runs that finish, are interrupted in every way, fail, or ask for too much."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster import Cluster
from command_line import checkpoints, last_step, metrics

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes" / "eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml"
SMALL = (
    "cluster.num_nodes=2",
    "cluster.gpus_per_node=1",
    "warm_start.steps=0",
    "train.num_prompts_per_step=4",
    "train.mini_batch_prompts=2",
    "rollout.max_response_tokens=8",
    "evaluation.num_prompts=4",
)
# Half of a random policy's responses are right, so every step has a gradient; SECONDS sets the pace of the steps.
REWARD = """
import os, time
def even_length(response, answer):
    time.sleep(float(os.environ["SECONDS_AN_ANSWER"]))
    return 1.0 if len(response) % 2 == 0 else -1.0
"""
RANK_1_BREAKS = """
import os
if os.environ.get("SLURM_PROCID") == "1":
    import torch.distributed
    def broken(*_, **__):
        raise RuntimeError("a part of rank 1 broke")
    torch.distributed.all_gather_object = broken
"""


def submit(cluster: Cluster, *arguments: str, path: Path, expect: int = 0, **environment: str) -> str:
    """`eapo-megatron submit` with `path` on the job's PYTHONPATH -> the job's id, or what was said on stderr."""
    cluster.environment |= {"PYTHONPATH": f"{REPOSITORY}:{path}", **environment}
    done = cluster.run(sys.executable, "-m", "eapo_megatron.cli", "submit", RECIPE, *SMALL, *arguments, expect=expect)
    return done.stdout.split(",")[0].removeprefix("job ") if expect == 0 else done.stderr


def ended(fields: dict[str, str]) -> bool:
    return fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def test_interrupted_in_every_way_a_run_equals_one_that_was_not(cluster: Cluster, work: Path) -> None:
    (work / "paced.py").write_text(REWARD)
    settings = ["train.steps=14", "checkpoint.every=0", "reward.function=paced:even_length"]
    whole = submit(cluster, *settings, "name=whole", path=work, SECONDS_AN_ANSWER="0")
    assert cluster.wait_for(whole, ended)["JobState"] == "COMPLETED"
    log = (work / "runs" / "whole" / "slurm" / f"{whole}.log").read_text()
    assert "on node[1-2]" in log
    assert log.endswith("done\n")

    run = work / "runs" / "parts"
    job = submit(cluster, *settings, "name=parts", path=work, SECONDS_AN_ANSWER="0.05")
    log_file = run / "slurm" / f"{job}.log"

    def runs_on_from(launch: int) -> int:
        """Waits until launch number `launch` has done two steps more -> the step that it went on from."""
        start = max(checkpoints(run), default=0)
        cluster.wait_for(job, lambda fields: last_step(run) >= start + 2 and fields["Restarts"] == str(launch))
        rank_0 = (run / "slurm" / f"{job}-logs" / str(launch) / "rank-0.log").read_text()
        assert not start or f"resumed from step {start}" in rank_0
        return start

    assert runs_on_from(0) == 0
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does ahead of the time limit
    cluster.wait_for(job, lambda fields: fields["JobState"] == "PENDING")
    assert "stopped on request, back to the queue" in log_file.read_text()
    assert checkpoints(run) == [last_step(run)]

    assert runs_on_from(1) >= 2
    node = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()[-1]
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    cluster.wait_for(job, lambda fields: fields["JobState"] == "PENDING")

    runs_on_from(2)
    assert node not in cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout
    cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]
    urgent_job = cluster.run("sbatch", "--parsable", *urgent).stdout.strip()
    cluster.wait_for(job, lambda fields: fields["JobState"] == "PENDING")
    assert checkpoints(run)[-1] == last_step(run)  # within the grace time that preemption leaves
    cluster.wait_for(urgent_job, ended)

    fields = cluster.wait_for(job, ended)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "3")
    assert metrics(run) == metrics(work / "runs" / "whole")
    assert [line["step"] for line in metrics(run)] == list(range(15))
    assert json.loads((run / "summary.json").read_text())["step"] == 14


def test_a_failing_rank_fails_the_job_and_shows_why(cluster: Cluster, work: Path) -> None:
    (work / "sitecustomize.py").write_text(RANK_1_BREAKS)
    job = submit(cluster, "name=fails", path=work)
    fields = cluster.wait_for(job, ended)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "0")
    log = (work / "runs" / "fails" / "slurm" / f"{job}.log").read_text()
    assert "task 1: Exited with exit code 1" in log
    assert "rank-1.log" in log
    assert "RuntimeError: a part of rank 1 broke" in log


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, work: Path) -> None:
    (work / "paced.py").write_text(REWARD)
    settings = ["train.steps=1000", "checkpoint.every=0", "reward.function=paced:even_length", "name=cancelled"]
    job = submit(cluster, *settings, path=work, SECONDS_AN_ANSWER="0")
    cluster.wait_for(job, lambda _: last_step(work / "runs" / "cancelled") > 0)
    cluster.run("scancel", job)
    fields = cluster.wait_for(job, lambda fields: ended(fields) and not cluster.run("squeue", "-h").stdout)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    assert checkpoints(work / "runs" / "cancelled") == [last_step(work / "runs" / "cancelled")]


def test_the_cluster_is_asked_for_what_the_recipe_says(cluster: Cluster, work: Path) -> None:
    layout = ["cluster.device=cuda", "cluster.gpus_per_node=8", "name=held"]
    job = submit(cluster, *layout, "--hold", "--time=1:00:00", "--comment=two words", path=work)
    fields = cluster.job(job)
    assert (fields["NumNodes"], fields["NumTasks"], fields["TresPerNode"]) == ("2-2", "16", "gres:gpu:8")
    assert (fields["JobName"], fields["TimeLimit"], fields["Requeue"]) == ("held", "01:00:00", "1")
    cluster.run("scancel", job)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cluster.num_nodes=8"], "cluster.num_nodes 8, gpus_per_node 1), sbatch --test-only runs/"),
        (["cluster.device=cuda", "cluster.gpus_per_node=10"], "Requested node configuration is not available"),
        (["--partition=none"], "invalid partition specified: none"),
        (["--no-such-option"], "unrecognized option"),
        (["optimizer.lrr=1"], "optimizer.lrr: unknown key (did you mean lr?)"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(
    cluster: Cluster, work: Path, arguments: list[str], sentence: str
) -> None:
    (line,) = submit(cluster, *arguments, path=work, expect=2).splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert cluster.run("squeue", "-h").stdout == ""


@pytest.mark.parametrize("script", ["slurm/train.sbatch", "torchrun.sh", "local.sh"])
def test_scripts_pass_sbatchs_own_test(cluster: Cluster, script: str) -> None:
    asked = ["--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"]
    cluster.run("sbatch", "--test-only", *asked, REPOSITORY / "launch" / script, "recipe.yaml")
