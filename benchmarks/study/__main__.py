"""The study on the built-in task, part by part, then its tables and figures.

    python -m benchmarks.study quadrants eapo methods [--runs DIR]     # make study PART=quadrants
    python -m benchmarks.study --tables [--runs DIR]                   # from the runs that have ended
    python -m benchmarks.study --page                                  # from benchmarks/results/study.json alone
    python -m benchmarks.study --quick                                 # make study-quick: that everything works

Every call can be repeated: runs that have ended are kept, one that was interrupted goes on. The numbers of all runs
are in benchmarks/results/study.json, the tables in docs/study.md; the quick study writes both into its runs' folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.measuring import circumstances
from benchmarks.study.figures import draw
from benchmarks.study.grid import PARTS, study_runs
from benchmarks.study.page import all_tables, write_page
from benchmarks.study.recorded import record_of
from benchmarks.study.runner import is_finished, run_all
from eapo_megatron.durable import write_text

ROOT = Path(__file__).parents[2]
RESULTS, PAGE, IMAGES = ROOT / "benchmarks/results/study.json", ROOT / "docs/study.md", ROOT / "docs/images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: runs/study or runs/study-quick")
    parser.add_argument("--quick", action="store_true", help="few steps of few runs, of all parts")
    parser.add_argument("--tables", action="store_true", help="run nothing: read the runs that have ended")
    parser.add_argument("--page", action="store_true", help="run nothing, read no run: the page from the results")
    options = parser.parse_args()
    plan = study_runs(quick=options.quick)
    reads_only = options.tables or options.page
    parts = list(PARTS) if options.quick and not reads_only else options.parts
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {unknown[0]!r}")
    if bool(parts) == reads_only:
        parser.error("name the parts to run, or --quick, --tables or --page")
    folder = options.runs or ROOT / ("runs/study-quick" if options.quick else "runs/study")
    results, page, images = RESULTS, PAGE, IMAGES
    if options.quick:
        results, page, images = folder / "study.json", folder / "study.md", folder / "images"
        images.mkdir(parents=True, exist_ok=True)

    failed = []
    if parts:
        seeds = {run.seed for part in parts for run in plan[part]}
        failed = run_all([run for run in plan["warm"] if run.seed in seeds], folder)
        failed += run_all([run for part in parts for run in plan[part]], folder)
    if not options.page:
        ended = [run for of_part in plan.values() for run in of_part if is_finished(run, folder)]
        records = [record_of(run, folder) for run in dict.fromkeys(ended)]
        write_text(results, json.dumps(circumstances() | {"runs": records}, separators=(",", ":")) + "\n")
        draw(plan, folder, images)
    study = json.loads(results.read_text(encoding="utf-8"))
    tables = all_tables(study, plan, images)
    write_text(page, write_page(PAGE.read_text(encoding="utf-8"), tables))
    print(f"{page}: tables of {len(study['runs'])} runs")
    if failed:
        sys.exit(f"failed: {', '.join(run.name for run in failed)}; their logs are in {folder / 'logs'}")


if __name__ == "__main__":
    main()
