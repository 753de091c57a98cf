"""The command line: exit codes, and one line for each mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from command_line import run_command
from eapo_megatron.config import RecipeError
from eapo_megatron.evaluation.benchmarks import BENCHMARKS
from eapo_megatron.launcher import rank_environment
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.saved_recipe import RECIPE_FILE, saved_form

FIRST_RECIPE = Path(__file__).parents[1] / "recipes" / "eapo-qwen2-tiny-arithmetic-1n2g-tp2.yaml"


def test_help_of_evaluate_names_the_benchmarks() -> None:
    assert set(BENCHMARKS) <= set(re.findall(r"\w+", run_command(["evaluate", "--help"]).stdout))


def test_dry_run_prints_the_resolved_recipe() -> None:
    done = run_command(["train", str(FIRST_RECIPE), "--dry-run", "optimizer.lr=2e-5"])
    assert done.returncode == 0
    resolved = yaml.safe_load(done.stdout)
    assert resolved["optimizer"]["lr"] == 2e-5
    assert resolved["rollout"]["temperature"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr: unknown key"),
        (["parallel.pipeline_model_parallel_size=2"], "does not divide the world of 2 ranks"),
        (["algorithm.shaping.alpha=2"], "alpha"),
        (["cluster.num_nodes=2"], "needs srun or torchrun"),
        (["reward.function=chess"], "reward.function: reward must be math, or"),
        (["reward.function=no_such_module:function"], "reward.function: reward 'no_such_module:function' cannot be"),
        (["reward.function=json:no_such_function"], "'json' has no attribute 'no_such_function'"),
        (["reward.function=json.decoder:NaN"], "NaN is not callable"),
        (["reward.function=shutil:disk_usage"], "it must take (response, answer), but disk_usage(path) does not"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    done = run_command(["train", str(FIRST_RECIPE), f"logging.run_dir={tmp_path}", *overrides])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert not list(tmp_path.iterdir())


def test_a_saved_recipe_of_another_version_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / FIRST_RECIPE.stem / RECIPE_FILE
    path.parent.mkdir()
    saved = saved_form(load_recipe(FIRST_RECIPE))
    saved["recipe"]["rollout"]["curiosity"] = 1
    path.write_text(json.dumps(saved))
    done = run_command(["train", str(FIRST_RECIPE), f"logging.run_dir={tmp_path}"])
    assert done.returncode == 2
    assert done.stderr == f"error: {path}: rollout.curiosity: unknown key\n"


def test_built_in_recipes_work_by_name_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = FIRST_RECIPE.stem
    done = run_command(["train", name, "--dry-run"])
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["name"] == name
    script = run_command(["submit", name, "--dry-run"]).stdout
    assert f"\nset -- {name}\n" in script  # a name is the same on every node
    listed = dict(line.split("\t") for line in run_command(["recipes"]).stdout.splitlines())
    assert listed[name].startswith("The first run")
    done = run_command(["recipes", "--copy", name, "mine.yaml"])
    assert (done.returncode, done.stdout) == (0, "mine.yaml\n")
    assert run_command(["train", "mine", "--dry-run", "seed=3"]).returncode == 0
    done = run_command(["recipes", "--copy", name, "mine.yaml"])
    assert (done.returncode, done.stderr) == (2, f"error: recipe {name} is not copied to mine.yaml: File exists\n")
    done = run_command(["recipes", "mine.yaml"])
    assert (done.returncode, done.stderr) == (2, "error: mine.yaml: a destination goes with --copy NAME\n")


def test_keys_without_a_terminal_are_lines_of_four_cells() -> None:
    done = run_command(["keys", "rollout.top_*"])
    assert done.returncode == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["rollout.top_p", "float > 0 and <= 1", "1.0"],
        ["rollout.top_k", "int >= 0", "0"],
    ]
    assert all(row[3].endswith(".") for row in rows)
    done = run_command(["keys", "--markdown", "lr"])
    assert (done.returncode, done.stderr) == (2, "error: --markdown prints every key: leave the pattern out\n")


def test_ranks_are_found_in_the_environment() -> None:
    assert rank_environment({}) is None
    assert rank_environment({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    address = {"MASTER_ADDR": "node1"}
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1234", **address}
    assert rank_environment({**torchrun, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == torchrun
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    with pytest.raises(RecipeError, match="MASTER_ADDR"):
        rank_environment(slurm)
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **address}
    assert rank_environment({**slurm, **address}) == {**ranks, "MASTER_PORT": "29500"}
    assert rank_environment({**slurm, **address, "MASTER_PORT": "1234"}) == {**ranks, "MASTER_PORT": "1234"}
