"""A recipe as a SLURM job: what its script asks for and does. tests/slurm runs it on a real cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from eapo_megatron.config import Recipe, RecipeError
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.slurm import job_folder, job_script, submit_job

RECIPE = Path(__file__).parents[1] / "recipes" / "eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml"


def load(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, ["cluster={num_nodes: 3, gpus_per_node: 4, device: cuda}", *overrides])


def run_script(script: str, tmp_path: Path, *, srun: str) -> tuple[int, str, list[str]]:
    """Runs a job's script with stand-ins for SLURM's commands -> exit code, output, what the commands were given."""
    calls = tmp_path / "calls"
    for name, body in {"srun": srun, "scontrol": 'if [[ $1 == show ]]; then printf "n7\\nn8\\n"; fi'}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\necho "{name} ${{*@Q}}" "$MASTER_ADDR" >>{calls}\n{body}\n')
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MASTER_ADDR": ""}
    done = subprocess.run(
        ["bash", "-c", script, "train.sbatch"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


def test_script_asks_for_the_recipes_cluster(tmp_path: Path) -> None:
    recipe = load("name=big", "logging.run_dir=my runs")
    script = job_script(recipe, ["r.yaml", "data.suffix=a b"], ["--time=2:00:00"], environment={})
    header, _, body = script.partition("\n\n")
    options = [shlex.split(line)[1] for line in header.splitlines() if line.startswith("#SBATCH")]
    assert options[-6:] == [
        "--job-name=big",
        "--output=my runs/big/slurm/%j.log",
        "--nodes=3",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=2:00:00",
    ]
    assert not any(line.startswith("#SBATCH") for line in body.splitlines())
    on_cpu = job_script(load("cluster.device=cpu"), [], environment={})
    assert "gpus-per-node=4" not in on_cpu

    code, _, calls = run_script(script, tmp_path, srun="exit 0")
    assert code == 0
    (srun,) = [line for line in calls if line.startswith("srun")]
    assert f"'{sys.executable}' '-m' 'eapo_megatron.cli' 'train' 'r.yaml' 'data.suffix=a b'" in srun
    assert "'--output=my runs/big/slurm/12-logs/0/rank-%t.log'" in srun
    assert srun.endswith(" n7")  # MASTER_ADDR
    assert "container" not in srun


def test_script_runs_in_the_container_of_the_environment(tmp_path: Path) -> None:
    environment = {"CONTAINER": "nvcr.io#nvidia/nemo:25.07", "MOUNTS": "/data:/data,/runs:/runs", "OTHER": "1"}
    script = job_script(load(), ["r.yaml"], environment=environment)
    _, _, calls = run_script(script, tmp_path, srun="exit 0")
    (srun,) = [line for line in calls if line.startswith("srun")]
    assert "'--container-image=nvcr.io#nvidia/nemo:25.07' '--container-mounts=/data:/data,/runs:/runs'" in srun
    assert f"'--container-workdir={tmp_path}'" in srun
    assert "'python3' '-m' 'eapo_megatron.cli'" in srun  # the image's


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_only_an_interrupted_run_goes_back_to_the_queue(tmp_path: Path, code: int, requeued: bool) -> None:
    script = job_script(load("name=a"), ["r.yaml"], environment={})
    exit_code, said, calls = run_script(script, tmp_path, srun=f"echo srun says so >&2; exit {code}")
    assert exit_code == code
    assert ("scontrol 'requeue' '12' n7" in calls) == requeued
    assert ("srun says so" in said) == (code == 1)


def test_without_sbatch_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(f"logging.run_dir={tmp_path}")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="there is no sbatch here"):
        submit_job(recipe, "#!/bin/sh\n")
    assert (job_folder(recipe) / "train.sbatch").read_text() == "#!/bin/sh\n"
