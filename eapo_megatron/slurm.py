"""A recipe as a SLURM job: launch/slurm/train.sbatch with the recipe's nodes and GPUs filled in.

With `rollout.vllm.num_nodes` it is launch/slurm/rollout_hetjob.sbatch, a job of two groups of nodes.

The script is complete: it holds its options, the interpreter and the recipe, and is kept in the run folder, so that
what was submitted can be read, changed and submitted again with sbatch alone.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from eapo_megatron.config import Recipe, RecipeError

SCRIPTS = Path(__file__).parent / "launch" / "slurm"


def job_folder(recipe: Recipe) -> Path:
    """Where the job's script and logs go."""
    return recipe.run_folder / "slurm"


def job_script(
    recipe: Recipe,
    arguments: Sequence[str],
    options: Sequence[str] = (),
    *,
    environment: Mapping[str, str],
) -> str:
    """The job that runs `eapo-megatron train ARGUMENTS` on the recipe's cluster section.

    arguments: the recipe's file and its overrides
    options: further sbatch options, `--name=value` or `--name`; they win over the script's own
    environment: CONTAINER and MOUNTS are kept in the script

    Raises:
        RecipeError: for what would begin a new line of the script.
    """
    cluster, folder = recipe.cluster, job_folder(recipe)
    asked = [
        f"--job-name={recipe.name}",
        f"--output={folder / '%j.log'}",
        f"--nodes={cluster.num_nodes}",
        f"--ntasks-per-node={cluster.gpus_per_node}",
    ]
    if cluster.device != "cpu":
        asked.append(f"--gpus-per-node={cluster.gpus_per_node}")
    variables = {"LOGS": str(folder)}
    template, servers = SCRIPTS / "train.sbatch", _servers(recipe)
    if servers:
        template, variables["TRAIN_SBATCH"] = SCRIPTS / "rollout_hetjob.sbatch", str(template)
    if "CONTAINER" in environment:
        variables |= {name: environment[name] for name in ("CONTAINER", "MOUNTS") if name in environment}
    else:
        variables["PYTHON"] = sys.executable
    for text in (*asked, *options, *arguments, *variables.values()):
        if any(character in text for character in "\n\r\0"):
            raise RecipeError(f"{text!r} holds a line break or NUL, which a job's script cannot hold")
    header, body = template.read_text(encoding="utf-8").split("\n\n", 1)
    lines = [
        header,
        *(f"#SBATCH {shlex.quote(option)}" for option in (*asked, *options)),
        *(
            ["#SBATCH hetjob", *(f"#SBATCH {shlex.quote(option)}" for option in (*servers, *options))]
            if servers
            else []
        ),
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f"set -- {shlex.join(arguments)}",
        body,
    ]
    return "\n".join(lines)


def _servers(recipe: Recipe) -> list[str]:
    """What is asked for vLLM's servers on nodes of their own; nothing where there are none."""
    cluster, vllm = recipe.cluster, recipe.rollout.vllm
    if recipe.rollout.engine != "vllm" or not vllm.num_nodes:
        return []
    if cluster.device == "cpu":
        return [f"--nodes={vllm.num_nodes}", "--ntasks-per-node=1"]
    per_node = max(cluster.gpus_per_node // vllm.tensor_parallel_size, 1)
    gpus = f"--gpus-per-task={vllm.tensor_parallel_size}"
    return [f"--nodes={vllm.num_nodes}", f"--ntasks-per-node={per_node}", gpus]


def submit_job(recipe: Recipe, script: str) -> str:
    """Writes the script into the run folder and gives it to sbatch -> the job's id.

    Raises:
        RecipeError: when there is no sbatch, it refuses the job, or the cluster could never start it as it is now
            (sbatch alone would queue it for ever); with SLURM's own words.
    """
    path = job_folder(recipe) / "train.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    if shutil.which("sbatch") is None:
        raise RecipeError(f"there is no sbatch here: submit {path} where SLURM is")
    _sbatch(recipe, "--test-only", str(path))
    return _sbatch(recipe, "--parsable", str(path)).partition(";")[0]


def _sbatch(recipe: Recipe, *arguments: str) -> str:
    done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        cluster = recipe.cluster
        raise RecipeError(
            f"SLURM refuses the job (cluster.num_nodes {cluster.num_nodes}, gpus_per_node {cluster.gpus_per_node}), "
            f"sbatch {' '.join(arguments)}: {done.stderr.strip()}"
        )
    return done.stdout.strip()
