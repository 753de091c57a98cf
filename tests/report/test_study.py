"""The study: its grid through the real configuration, its tests of predictions against float64, its page."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import write_run

from benchmarks.study import runner
from benchmarks.study.grid import PARTS, RECIPE, SEEDS, StudyRun, study_runs
from benchmarks.study.page import all_tables, write_page
from benchmarks.study.predictions import PREDICTIONS, STATISTICS, T_975, Prediction, answer, interval
from benchmarks.study.recorded import record_of
from eapo_megatron.config import METHODS, Recipe
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.saved_recipe import experiment
from eapo_megatron.training.warm_start import cache_folder

ROOT = Path(__file__).parents[2]


def recipes(*, quick: bool = False) -> dict[StudyRun, Recipe]:
    runs = dict.fromkeys(run for of_part in study_runs(quick=quick).values() for run in of_part)
    return {run: load_recipe(ROOT / RECIPE, run.overrides) for run in runs}


@pytest.fixture(scope="module")
def grid() -> dict[StudyRun, Recipe]:
    return recipes()


def test_one_name_is_one_run(grid: dict[StudyRun, Recipe]) -> None:
    assert max(Counter(run.name for run in grid).values()) == 1
    settings = [
        json.dumps({**experiment(recipe), "name": ""}, sort_keys=True) for run, recipe in grid.items() if run.seed == 1
    ]
    assert len(set(settings)) == len(settings) - 1  # the warm start is `full` with one step


def test_runs_of_a_seed_share_their_warm_start(grid: dict[StudyRun, Recipe]) -> None:
    caches = {(run.seed, cache_folder(recipe)) for run, recipe in grid.items()}
    assert len(caches) == len({run.seed for run in grid}) == 5


def test_every_run_has_the_same_budget_of_rollouts_and_several_updates(grid: dict[StudyRun, Recipe]) -> None:
    for run, recipe in grid.items():
        train = recipe.train
        assert recipe.algorithm.dynamic_sampling_rounds == 1
        assert train.num_prompts_per_step >= 2 * train.mini_batch_prompts
        assert train.steps == (1 if run.condition == "warm" else load_recipe(ROOT / RECIPE).train.steps)
        assert recipe.cluster.world_size == 1


def test_the_grid_is_the_studys() -> None:
    assert set(PARTS["methods"]) == set(METHODS)
    assert len(SEEDS["quadrants"]) >= 5
    assert len(SEEDS["eapo"]) >= 5
    assert len(SEEDS["methods"]) >= 3
    for part, predictions in PREDICTIONS.items():
        for prediction in predictions:
            assert {*prediction.more, *prediction.less} <= set(PARTS[part]), prediction.claim
            assert prediction.statistic in STATISTICS


def test_the_quick_study_is_the_same_in_small() -> None:
    quick = recipes(quick=True)
    assert len({cache_folder(recipe) for recipe in quick.values()}) == 2
    assert all(recipe.train.steps <= 4 for recipe in quick.values())


def test_settings_of_conditions(grid: dict[StudyRun, Recipe]) -> None:
    of = {run.condition: recipe for run, recipe in grid.items() if run.seed == 1}
    full, eapo = experiment(of["full"]), experiment(of["eapo"])
    full["algorithm"].pop("shaping"), eapo["algorithm"].pop("shaping"), full.pop("name"), eapo.pop("name")
    assert full == eapo
    assert of["phr-q50"].algorithm.quadrant_threshold == "q50"
    assert of["eapo-alpha-0.5"].make_algorithm().shaping_options["alpha"] == 0.5
    assert list(of["eapo-without-nlr"].make_algorithm().shaping_options["without"]) == ["nlr"]


@pytest.mark.parametrize("degrees", T_975)
def test_quantiles_of_students_t(degrees: int) -> None:
    """By Simpson's rule over the density from 0 to the quantile."""
    scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    count, width = 20_000, T_975[degrees] / 20_000
    density = [scale * (1 + (i * width) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(count + 1)]
    area = width / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))
    assert area == pytest.approx(0.475, abs=1e-6)


def test_an_interval_is_students() -> None:
    values = [0.31, 0.28, 0.4, 0.35, 0.22]
    mean, low, high = interval(values)
    reach = 2.776445 * statistics.stdev(values) / math.sqrt(5)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-15)
    assert (low, high) == pytest.approx((mean - reach, mean + reach), abs=1e-6)
    with pytest.raises(ValueError, match="values must be 2 to 10, got 1"):
        interval([1.0])


def record(condition: str, seed: int, rates: list[float], **others: Any) -> dict[str, Any]:
    held_out = {"step": list(range(len(rates))), "solve_rate": rates, "pass@8": [min(1.0, 2 * x) for x in rates]}
    return {"condition": condition, "seed": seed, "held_out": held_out, **others}


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        ("end", [0.1, 0.2, 0.15]),
        ("speed", [0.1, 0.2, 0.15]),
    ],
)
def test_a_paired_test_has_a_known_answer(statistic: str, expected: list[float]) -> None:
    gains = {1: 0.1, 2: 0.2, 3: 0.15}
    starts = {1: 0.3, 2: 0.05, 3: 0.2}  # far more spread between seeds than between conditions
    runs = [record("plr", seed, [0.9, *([starts[seed]] * 3)]) for seed in gains]
    runs += [
        record("phr", seed, [0.9, *(starts[seed] + gain + shift for shift in (0.0, -0.02, 0.02))])
        for seed, gain in gains.items()
    ]
    found = answer(Prediction("", statistic, ("phr",), ("plr",)), runs, (1, 2, 3))
    assert found is not None
    reach = 4.302653 * statistics.stdev(expected) / math.sqrt(3)
    assert found.mean == pytest.approx(statistics.fmean(expected), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((found.mean - reach, found.mean + reach), abs=1e-6)
    assert found.verdict == "holds"
    contrary = answer(Prediction("", statistic, ("plr",), ("phr",)), runs, (1, 2, 3))
    assert contrary is not None
    assert contrary.verdict == "does not hold"
    unstated = answer(Prediction("", statistic, ("plr",), ("phr",), stated=False), runs, (1, 2, 3))
    assert unstated is not None
    assert unstated.verdict == "lower"
    assert answer(Prediction("", statistic, ("phr",), ("plr",)), runs, (1, 2, 3, 4)) is None


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ([0.24, 0.25, 0.26], "holds"),
        ([0.34, 0.35, 0.36], "does not hold"),
        ([0.18, 0.19, 0.21], "cannot be told here"),
    ],
)
def test_about_a_quarter_is_a_range(shares: list[float], verdict: str) -> None:
    runs = [record("full", seed, [0.5], high_share=[share]) for seed, share in enumerate(shares)]
    found = answer(Prediction("", "high", ("full",), within=(0.2, 0.3)), runs, (0, 1, 2))
    assert found is not None
    assert found.verdict == verdict


def test_an_interval_around_zero_tells_nothing() -> None:
    runs = [record("a", seed, [0.5 + (-1) ** seed * 0.1]) for seed in (1, 2)]
    runs += [record("b", seed, [0.5]) for seed in (1, 2)]
    found = answer(Prediction("", "end", ("a",), ("b",)), runs, (1, 2))
    assert found is not None
    assert found.verdict == "cannot be told here"


def recorded_run(folder: Path, run: StudyRun) -> None:
    """A run folder with Pass@k, as training leaves it."""
    write_run(folder / run.name, seed=run.seed)
    path = folder / run.name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    passes = {f"held_out/pass@{k}": 0.5 + 0.01 * run.seed for k in (2, 4, 8, 32)}
    lines = [line | passes | {"updates": 2, "skipped_updates": 0, "rollout/reward_failures": 0} for line in lines]
    start = {"step": 0, "held_out/solve_rate": 0.25, "skipped_updates": 0, **passes}
    path.write_text("".join(json.dumps(line) + "\n" for line in [start, *lines]))
    (folder / run.name / "summary.json").write_text("{}")


def test_numbers_of_a_run_are_its_records(tmp_path: Path) -> None:
    run = StudyRun("warm", 3, ())
    recorded_run(tmp_path, run)
    found = record_of(run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / run.name / "metrics.jsonl").read_text().splitlines()]
    assert found["steps"] == 6
    assert found["held_out"]["step"] == [0, 1, 2, 3, 4, 5, 6]
    assert found["held_out"]["solve_rate"] == pytest.approx([0.25, *(i / 12 + 0.03 for i in range(1, 7))], abs=1e-6)
    assert found["entropy"] == pytest.approx([line["entropy/mean"] for line in lines[1:]], rel=1e-5)
    highs = [line["quadrants/phr/token_share"] + line["quadrants/nhr/token_share"] for line in lines[1:]]
    assert found["high_share"] == pytest.approx(highs, rel=1e-5)
    assert found["response_tokens"] == sum(line["response_length/total"] for line in lines[1:])
    assert STATISTICS["end"](found) == pytest.approx((5 + 6) / 24 + 0.03, abs=1e-6)
    assert STATISTICS["speed"](found) == pytest.approx(21 / 72 + 0.03, abs=1e-6)
    assert STATISTICS["pass"](found) == pytest.approx(0.53)
    assert sum(map(sum, found["histogram"].values())) == found["response_tokens"] == found["credit"]["tokens"]
    assert found["thresholds"]["mean"][0] == pytest.approx(statistics.fmean(found["high_share"]), abs=0.02)
    assert found["thresholds"]["q25"][0] == pytest.approx(0.75, abs=0.02)
    assert 0 <= found["credit"]["explained_of_advantage"] < 0.1  # entropies and advantages are independent


def test_a_part_with_a_missing_run_is_not_run(tmp_path: Path) -> None:
    plan = study_runs(quick=True)
    for run in plan["warm"] + plan["quadrants"]:
        recorded_run(tmp_path, run)
    records = [record_of(run, tmp_path) for run in plan["warm"] + plan["quadrants"]]
    study = {"date": "2026-01-01", "machine": {"cpu": "c", "cores": 2, "torch": "2"}, "runs": records}
    tables = all_tables(study, plan, None)
    assert tables["eapo/tests"].startswith("**Not run.** 2 of the 4 runs")
    assert "| `phr` |" in tables["quadrants/conditions"]
    # Equal but for the seed's own number: no difference at all, whose interval is a point at 0.
    row = next(line for line in tables["quadrants/tests"].splitlines() if "Pass@8 than PHR |" in line)
    assert "0.00 (0.00 to 0.00)" in row
    assert "cannot be told here" in row
    assert "not run" in tables["quadrants/tests"]  # what needs conditions that the quick study leaves out
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    written = write_page(page, tables)
    assert tables["quadrants/tests"] in written
    assert write_page(written, tables) == written
    incomplete = all_tables(study | {"runs": records[1:]}, plan, None)
    assert incomplete["quadrants/conditions"].startswith("**Not run.**")
    assert incomplete["task"].startswith("**Not run.**")


def test_markers_and_tables_must_match() -> None:
    with pytest.raises(ValueError, match=r"markers \['a'\], the tables are \['b'\]"):
        write_page("<!-- study: a -->\n<!-- end -->\n", {"b": ""})


def test_the_page_is_made_of_the_recorded_numbers() -> None:
    study = json.loads((ROOT / "benchmarks" / "results" / "study.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert write_page(page, all_tables(study, study_runs(), ROOT / "docs" / "images")) == page


def test_the_runner_skips_what_has_ended_and_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a program in the place of training that fails for one name and writes the summary of the others."""
    program = tmp_path / "program"
    program.write_text(
        "#!/bin/bash\n"
        'for word in "$@"; do\n'
        "case $word in name=*) name=${word#name=};; logging.run_dir=*) dir=${word#*=};; esac\n"
        "done\n"
        "echo $name $OMP_NUM_THREADS\n"
        "[ $name = phr-seed1 ] && exit 3\n"
        "mkdir -p $dir/$name && echo {} > $dir/$name/summary.json\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    runs = [StudyRun(condition, 1, ()) for condition in ("full", "phr", "full")]
    folder = tmp_path / "runs"
    assert runner.run_all(runs, folder) == [runs[1]]
    assert (folder / "logs" / "full-seed1.log").read_text() == "full-seed1 1\n"
    assert "phr-seed1, failed (exit code 3)" in capsys.readouterr().out
    (folder / "logs" / "full-seed1.log").unlink()
    assert runner.run_all(runs, folder) == [runs[1]]
    assert not (folder / "logs" / "full-seed1.log").exists()
