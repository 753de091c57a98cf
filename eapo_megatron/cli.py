"""The command line: one function a command. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from glob import escape, glob
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from omegaconf import OmegaConf

from eapo_megatron import __version__
from eapo_megatron.config import RecipeError
from eapo_megatron.failures import described, print_error, report_failure
from eapo_megatron.launcher import check_devices, rank_environment, run_local_ranks
from eapo_megatron.ranks import check_recipe, evaluate_rank, train_rank
from eapo_megatron.recipe_files import built_in_recipes, copy_recipe, load_recipe
from eapo_megatron.rollout.vllm_release import check_addresses
from eapo_megatron.run_lock import check_unlocked
from eapo_megatron.saved_recipe import resolved
from eapo_megatron.slurm import job_folder, job_script, submit_job

app = typer.Typer(pretty_exceptions_enable=False)

convert = typer.Typer(help="Checkpoints to Hugging Face's format and back, in one process.")
app.add_typer(convert, name="convert")

UsageError: Any = typer.BadParameter.__base__  # click's, or that of typer's own copy of click
GIB = 2**30
DType = Literal["float32", "bfloat16", "float16"]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _recipe_names(incomplete: str) -> list[str]:
    """For the shell's completion; files are completed too."""
    files = (path for path in glob(f"{escape(incomplete)}*") if os.path.isdir(path) or path.endswith(".yaml"))
    return [*(name for name in built_in_recipes() if name.startswith(incomplete)), *files]


RecipeArgument = Annotated[
    str,
    typer.Argument(help="A recipe file, or the name of a built-in recipe.", autocompletion=_recipe_names),
]


@app.callback()
def cli(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Entropy-aware policy optimization on Megatron: train, plan, submit, evaluate, report, convert."""


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Trains a recipe, or goes on with it from its last checkpoint.

    Under torchrun or srun this process is one of the ranks; started bare, it starts them. On SIGUSR1 or SIGTERM the
    run finishes its step, saves a checkpoint and exits with code 75.
    """
    overrides = overrides or []
    if not dry_run and (environment := rank_environment(os.environ)) is not None:
        train_rank(recipe, overrides, environment)
        return
    settings = load_recipe(recipe, overrides)
    if dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(resolved(settings))), end="")
        return
    if settings.cluster.num_nodes > 1:
        raise RecipeError(f"{recipe}: cluster.num_nodes {settings.cluster.num_nodes} needs srun or torchrun")
    check_devices(settings)
    check_addresses(settings)
    check_recipe(settings, source=recipe)
    check_unlocked(settings.run_folder)
    raise typer.Exit(run_local_ranks(settings.cluster.world_size, ["train", recipe, *overrides]))


@app.command()
def evaluate(
    subject: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT_OR_HF_FOLDER", help="Of a run: its last whole checkpoint.")
    ],
    benchmarks: Annotated[
        str, typer.Option(help="aime24, aime25, amc, math500, minerva, olympiad, mmlu_pro, with commas.")
    ],
    data: Annotated[Path | None, typer.Option(help="The folder with the benchmarks' files; default: the hub.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the run's recipe.")] = None,
    n: Annotated[int | None, typer.Option(help="Responses to each problem; default: the paper's number.")] = None,
    k: Annotated[str | None, typer.Option(help="Pass@k to print, numbers with commas; default: n.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: evaluation/CHECKPOINT in the run, or evaluation/NAME.")
    ] = None,
    again: Annotated[bool, typer.Option("--rescore", help="Only verify again what is in responses.jsonl.")] = False,
) -> None:
    """Avg@k and Pass@k of a policy on named benchmarks; a killed evaluation goes on where its responses end."""
    from eapo_megatron.evaluation.command import prepare_evaluation, report_evaluation, rescore_all

    overrides = overrides or []
    prepare = partial(prepare_evaluation, subject, overrides, benchmarks, data=data, n=n, ks=k, out=out)
    if not again and (environment := rank_environment(os.environ)) is not None:
        evaluate_rank(prepare, environment)
        return
    evaluation = prepare()
    check_unlocked(evaluation.file.folder)
    if again:
        evaluation.say_left_out()
        rescore_all(evaluation)
        report_evaluation(evaluation)
        return
    cluster = evaluation.examination.recipe.cluster
    if cluster.num_nodes > 1:
        raise RecipeError(f"{subject}: cluster.num_nodes {cluster.num_nodes} needs srun or torchrun")
    check_devices(evaluation.examination.recipe)
    given = {"benchmarks": benchmarks, "data": data, "n": n, "k": k, "out": out}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    raise typer.Exit(run_local_ranks(cluster.world_size, ["evaluate", str(subject), *overrides, *options]))


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe.")] = None,
) -> None:
    """Prints a recipe's parameters, memory, work and communication, without a GPU or the weights.

    Exit code 1 says that it does not fit the GPU that cluster.gpu names.
    """
    from rich.console import Console

    from eapo_megatron.planning.plan import make_plan  # torch: seconds
    from eapo_megatron.planning.report import print_plan

    planned = make_plan(load_recipe(recipe, overrides or []), source=recipe)
    print_plan(planned, Console())
    if planned.fits is False:
        raise typer.Exit(1)


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    recipe: RecipeArgument,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, over the recipe; --name=value, an option of sbatch.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job's script and stop.")] = False,
) -> None:
    """Submits a recipe to SLURM, on the nodes and GPUs of its cluster section.

    With CONTAINER set, the image and the bind mounts in MOUNTS are the job's; paths in the recipe are the container's
    and are checked there.
    """
    options = [argument for argument in arguments or [] if argument.startswith("-")]
    overrides = [argument for argument in arguments or [] if not argument.startswith("-")]
    settings = load_recipe(recipe, overrides)
    if "CONTAINER" not in os.environ:
        check_recipe(settings, source=recipe)
    script = job_script(settings, [recipe, *overrides], options, environment=os.environ)
    if dry_run:
        print(script, end="")
        return
    job = submit_job(settings, script)
    print(f"job {job}, log {job_folder(settings) / f'{job}.log'}")


@app.command()
def check(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
) -> None:
    """Reads all of a run's checkpoints and says which are whole, by their checksums. Exit code 1: one is not."""
    from eapo_megatron.policy.checkpoint import check_run  # megatron: seconds

    found = [
        (str(path), problem or ("whole" if has_checksums else "whole in form (it has no checksums)"), problem is None)
        for path, problem, has_checksums in check_run(run)
    ]
    _print_table(("checkpoint", "condition"), [row[:2] for row in found])
    if not all(is_whole for *_, is_whole in found):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN ...]", help="The folders of runs.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")] = Path("report"),
    demo: Annotated[bool, typer.Option("--demo", help="Report the recorded runs that the package ships.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Refresh it as the runs go on, until Ctrl-C.")] = False,
    credit: Annotated[bool, typer.Option("--credit", help="Measure tokens' credit on the runs' policies.")] = False,
) -> None:
    """Draws the figures of the paper from runs' records, and one HTML page that needs no network.

    The page shows every recorded token (logging.record_tokens) with its quadrant, entropy, log-probs and advantage.
    """
    if demo == bool(runs) or (demo and (follow or credit)):
        raise RecipeError("report takes the folders of runs, or --demo alone")
    if credit and follow:
        raise RecipeError("--credit opens the policies of runs once: it does not go with --follow")
    if find_spec("matplotlib") is None:
        raise RecipeError("report draws with matplotlib: pip install 'eapo_megatron[train]'")
    from eapo_megatron.report import report as reports  # torch, matplotlib: seconds

    with _whole_or_nothing(out):
        if follow:
            reports.follow(runs or [], out, print)
            return
        written = reports.write_demo(out) if demo else reports.write_report(runs or [], out, credit=credit)
    for note in written.notes:
        print(note, file=sys.stderr)
    if written.credit:
        from rich.console import Console

        from eapo_megatron.report.of_measured_credit import credit_table

        for measurement in written.credit:
            Console().print(credit_table(measurement))
    print(f"{written.page} and {len(written.figures)} files of figures")


@app.command()
def serve(
    recipe: RecipeArgument,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The port to listen on.")] = 8000,
) -> None:
    """Runs a server of vLLM for runs with `rollout.vllm.placement: separate`, which send it its weights.

    The server lets whoever reaches its port replace its weights: keep it inside the cluster.
    """
    import torch  # seconds

    from eapo_megatron.rollout.vllm_server import serve as serve_until_it_ends

    settings = load_recipe(recipe, overrides or [])
    device = settings.cluster.device
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    raise typer.Exit(serve_until_it_ends(settings, source=recipe, host=host, port=port, on_gpu=on_gpu))


@app.command()
def recipes(
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="With --copy: the new file, or its folder; default: here.")
    ] = None,
    copy: Annotated[str | None, typer.Option("--copy", metavar="NAME", help="Copy this one, to edit it.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print recipes/README.md: with layout and memory.")
    ] = False,
) -> None:
    """Lists the built-in recipes, or copies one; a file that is there already is never overwritten."""
    if markdown:
        from eapo_megatron.recipe_table import recipe_page  # torch: seconds

        print(recipe_page(), end="")
    elif copy is not None:
        print(copy_recipe(copy, destination or Path()))
    elif destination is not None:
        raise RecipeError(f"{destination}: a destination goes with --copy NAME")
    else:
        _print_table(("recipe", "what it is"), built_in_recipes().items())


@app.command()
def keys(
    pattern: Annotated[str, typer.Argument(help="A part of the path or description, or a shell glob.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/keys.md.")] = False,
) -> None:
    """Prints the recipe's keys: path, type or choices, default, description; without a terminal, separated by tabs."""
    from eapo_megatron.recipe_keys import keys_page, recipe_keys  # torch: seconds

    if markdown:
        if pattern:
            raise RecipeError("--markdown prints every key: leave the pattern out")
        print(keys_page(), end="")
        return
    _print_table(("key", "type", "default", "description"), [astuple(key) for key in recipe_keys(pattern)])


@app.command()
def doctor() -> None:
    """Prints what is installed, what the machine has and which backends runs use here: a table for a bug report."""
    from eapo_megatron.doctor import diagnose, table  # torch, megatron: seconds

    print(table(diagnose()), end="")


@convert.command("to-hf")
def convert_to_hf(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run (its latest checkpoint), or a torch_dist checkpoint."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="The Hugging Face folder to make.")],
    config: Annotated[
        Path | None, typer.Option(help="The model's Hugging Face folder or config.json, for others' checkpoints.")
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: as the checkpoint has it.")] = None,
    max_shard_size: Annotated[float, typer.Option(min=1e-6, help="Of a safetensors file, in GiB.")] = 5.0,
) -> None:
    """Writes a Hugging Face folder from a checkpoint of this project, Megatron-LM or NeMo 2."""
    from eapo_megatron.weights.convert import to_hf  # torch: seconds

    if not isfinite(max_shard_size):
        raise RecipeError(f"--max-shard-size must be a finite number, got {max_shard_size}")
    with _whole_or_nothing(out):
        to_hf(source, out, config=config, dtype=_dtype(dtype), max_shard_bytes=int(max_shard_size * GIB))


@convert.command("from-hf")
def convert_from_hf(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="What Megatron-LM's --load is given.")],
    dtype: Annotated[DType | None, typer.Option(help="Default: as the folder has it.")] = None,
    nemo: Annotated[bool, typer.Option("--nemo", help="For NeMo 2's RestoreConfig instead.")] = False,
) -> None:
    """Writes a megatron-core torch_dist checkpoint from a Hugging Face folder."""
    from eapo_megatron.weights.convert import from_hf  # torch: seconds

    with _whole_or_nothing(out):
        from_hf(source, out, dtype=_dtype(dtype), nemo=nemo)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere one line a row, its cells separated by tabs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    console.print(table)


def _dtype(name: str | None):  # type: ignore[no-untyped-def]
    import torch

    return None if name is None else getattr(torch, name)


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[None]:
    """A disk that is full, or files that cannot be read, are one line and exit code 1."""
    try:
        yield
    except OSError as error:
        print_error(f"{out} was not written: {error}")
        raise typer.Exit(1) from error


def main() -> None:
    """Runs the command line. What goes wrong is one line: exit code 2 for bad input, 1 for everything else."""
    # megatron-core tells every process which optional GPU packages it does without, and torch of its own deprecations.
    warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\.")
    try:
        code = app(prog_name="eapo-megatron", standalone_mode=False)
        sys.stdout.flush()
    except RecipeError as error:
        print_error(str(error))
        code = 2
    except UsageError as error:
        print_error(f"{error.format_message()} ({error.ctx.command_path if error.ctx else 'eapo-megatron'} --help)")
        code = 2
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        print_error(described(error))
        code = 1
    except Exception as error:
        report_failure(error)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
