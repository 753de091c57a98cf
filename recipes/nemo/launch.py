"""Launches a recipe as NeMo-Run launches things, on this machine or on a SLURM cluster with pyxis:

    python recipes/nemo/launch.py recipes/NAME.yaml [key.path=value ...]
    python recipes/nemo/launch.py recipes/NAME.yaml --account research --image eapo.sqsh --partition gpu

`--dryrun` prints what would run.
"""

import argparse
import sys

import nemo_run as run
from torchx.specs import AppState

from eapo_megatron.config import RecipeError
from eapo_megatron.integrations.nemo_run import eapo_recipe, local_executor, slurm_executor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the recipe")
    parser.add_argument("--account", help="SLURM account; without it the run stays on this machine")
    parser.add_argument("--image", help="container image with this package and its [train] extra")
    parser.add_argument("--partition")
    parser.add_argument("--time", default="04:00:00")
    parser.add_argument("--mounts", nargs="*", default=[], help="SOURCE:TARGET")
    parser.add_argument("--dryrun", action="store_true")
    arguments = parser.parse_args()
    if (arguments.account is None) != (arguments.image is None):
        parser.error("--account and --image go together")

    task = eapo_recipe(arguments.recipe, arguments.overrides)
    if arguments.account is None:
        executor = local_executor(arguments.recipe, arguments.overrides)
    else:
        executor = slurm_executor(
            arguments.recipe,
            arguments.overrides,
            account=arguments.account,
            container_image=arguments.image,
            container_mounts=arguments.mounts,
            partition=arguments.partition,
            time=arguments.time,
            tunnel=run.LocalTunnel(job_dir=run.config.get_nemorun_home()),
        )
    with run.Experiment("eapo") as experiment:
        experiment.add(task, executor=executor, name="train")
        if arguments.dryrun:
            experiment.dryrun()
        else:
            experiment.run(tail_logs=True, detach=arguments.account is not None)
    # Leaving the block waited for a local run.
    if not arguments.dryrun and arguments.account is None and experiment.jobs[0].state != AppState.SUCCEEDED:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
