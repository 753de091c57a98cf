"""Runs the study's runs, each a process of its own on one thread, two at a time.

A run that has ended is skipped; one that was interrupted goes on from its last checkpoint. Warm starts come first, so
that no two runs make the same one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.study.grid import RECIPE, StudyRun
from eapo_megatron.records.records import SUMMARY_FILE

AT_A_TIME = 2
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def is_finished(run: StudyRun, folder: Path) -> bool:
    """Whether the run has ended: its summary is the last thing that it writes."""
    return (folder / run.name / SUMMARY_FILE).is_file()


def run_all(runs: Sequence[StudyRun], folder: Path) -> list[StudyRun]:
    """Runs what has not ended yet -> the runs that failed; what they printed is in FOLDER/logs."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(runs))
    left = [run for run in wanted if not is_finished(run, folder)]
    if len(left) < len(wanted):
        print(f"{len(wanted) - len(left)} of {len(wanted)} runs have ended before", flush=True)
    failed = []
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        try:
            waiting = {pool.submit(_run, run, folder): run for run in left}
            for number, future in enumerate(as_completed(waiting), start=1):
                run, (code, seconds) = waiting[future], future.result()
                outcome = f"{seconds:.0f} s" if code == 0 else f"failed (exit code {code})"
                print(f"{number} of {len(left)}: {run.name}, {outcome}", flush=True)
                if code:
                    failed.append(run)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _run(run: StudyRun, folder: Path) -> tuple[int, float]:
    """Exit code and seconds of one training process."""
    command = [sys.executable, "-m", "eapo_megatron.cli", "train", RECIPE, *run.overrides, f"logging.run_dir={folder}"]
    began = time.monotonic()
    with (folder / "logs" / f"{run.name}.log").open("w") as log:
        done = subprocess.run(command, env=os.environ | _ONE_THREAD, stdout=log, stderr=subprocess.STDOUT)
    return done.returncode, time.monotonic() - began
