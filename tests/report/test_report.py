"""The command: what it writes, and one line for everything that is missing, damaged, older or still going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from recorded_runs import write_run

from eapo_megatron import cli
from eapo_megatron.config import RecipeError
from eapo_megatron.records.tokens import recorded_steps
from eapo_megatron.report import recordings
from eapo_megatron.report.recordings import read_run
from eapo_megatron.report.report import FIGURES, PAGE_FILE, write_demo, write_report
from eapo_megatron.run_lock import RunLock


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["eapo-megatron", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("metrics", ["", "not JSON\n"])
def test_runs_without_records_are_code_2_and_named(
    metrics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
    assert command(monkeypatch, tmp_path / "run", tmp_path / "none", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'run'} has no records: neither metrics.jsonl nor tokens/" in line
    assert f"{tmp_path / 'none'} is not the folder of a run" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--demo", "run"], ["--demo", "--follow"]])
def test_runs_or_the_demo(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert "report takes the folders of runs, or --demo alone" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", steps=2)
    assert command(monkeypatch, run, tmp_path / "none", "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'none'} is not the folder of a run" in said.err
    assert "not drawn: Pass@k: no run has an evaluation" in said.err
    assert str(tmp_path / "out" / PAGE_FILE) in said.out
    assert (tmp_path / "out" / "figures" / "training.svg").is_file()


def test_a_cut_line_is_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    read = read_run(run)
    assert [line["step"] for line in read.metrics] == [1, 2]
    assert read.notes == [f"{path}: line 3 is damaged and left out"]


def test_a_damaged_row_group_is_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    path = recorded_steps(run)[2]
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(11)  # its entropies
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(data)
    read = read_run(run)
    assert read.tokens is not None
    places = list(zip(read.tokens.steps, read.tokens.groups, strict=True))
    assert places == [(1, 0)] * 4 + [(1, 1)] * 4 + [(2, 0)] * 4
    (note,) = read.notes
    assert note.startswith(f"{path}: row group 1 is damaged and left out")

    path.write_bytes(b"PAR1")
    (note,) = read_run(run).notes
    assert note.startswith(f"{path} is damaged and left out")


def test_of_more_tokens_than_a_page_holds_some_steps_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", steps=8)
    everything = read_run(run).tokens
    assert everything is not None
    total = int(everything.offsets[-1])
    monkeypatch.setattr(recordings, "MOST_TOKENS", total // 3 + 1)
    read = read_run(run)
    assert read.tokens is not None
    assert set(read.tokens.steps) == {2, 5, 8}
    assert read.notes == [f"{run}: {total:,} tokens are recorded; of these the report reads 1 recorded step in 3"]


def test_records_of_another_version_are_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    (path,) = recorded_steps(run).values()
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    read = read_run(run)
    assert read.tokens is None
    assert read.notes == [f"{path} is of version 0 of the token records, this reads 1: left out"]
    report = write_report([run], tmp_path / "out")
    assert "not drawn: words: no run has token records (logging.record_tokens)" in report.notes


def test_metrics_of_an_older_version_draw_what_they_allow(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "rollout/solve_rate": 0.5}\n')
    report = write_report([run], tmp_path / "out")
    assert f"{run / 'recipe.json'} is missing: the run goes by its folder's name" in report.notes
    assert {path.stem for path in report.figures} == {"training"}


def test_a_run_that_goes_on_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    script = (
        "import sys, time; from pathlib import Path; from eapo_megatron.run_lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        read = read_run(run)
    finally:
        holder.kill()
        holder.wait()
    assert read.is_running
    assert read.notes == [f"{run} is still running: its records up to step 2"]
    assert not read_run(run).is_running
    with RunLock(run):
        pass  # the lock of the dead holder is no obstacle


def test_nothing_to_read_names_the_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not the folder of a run"):
        read_run(tmp_path / "run")


def test_the_demo_has_every_figure_and_recorded_tokens(tmp_path: Path) -> None:
    report = write_demo(tmp_path)
    assert report.notes == []
    assert len(report.figures) == 2 * len(FIGURES)
    assert report.page.stat().st_size > 200_000


@pytest.mark.slow
def test_follow_refreshes_and_ctrl_c_ends_it_with_code_0(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", steps=2), tmp_path / "out"
    command = [sys.executable, "-m", "eapo_megatron.cli", "report", str(run), "--out", str(out), "--follow"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs in the background
    )
    page = out / PAGE_FILE

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 120
        while not (page.is_file() and text in page.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    try:
        wait_for("2 steps")
        assert '"reload": 15' in page.read_text()
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "rollout/solve_rate": 0.5}\n')
        wait_for("3 steps")
        os.kill(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert "Ctrl-C ends this" in said
    assert '"reload": 0' in page.read_text()


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({"algorithm": {"shaping": {"name": "eapo", "alpha": 0.5}}}, "eapo, \u03b1 = 0.5"),
        ({"algorithm": {"shaping": {"name": "none"}, "advantage_estimator": "rloo"}}, "rloo"),
        ({"algorithm": {"shaping": {"name": "quadrant", "only": ["phr", "plr"]}}}, "phr+plr"),
        ({"algorithm": {"shaping": {"name": "none"}, "loss": {"name": "gspo"}}}, "gspo"),
        ({"method": "eapo", "algorithm": {"shaping": {"name": "mine:confident"}}}, "mine:confident"),
        ({"method": "dapo", "algorithm": {"shaping": {"name": "none"}}}, "dapo"),
        ({}, "folder"),
    ],
)
def test_a_run_goes_by_its_method(recipe: dict, method: str) -> None:
    run = recordings.RecordedRun(Path("folder"), recipe, [], {}, None, is_running=False)
    assert run.method == method
