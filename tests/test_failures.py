"""What nothing foresaw: one line, exit code 1, the traceback in a log; a full disk leaves nothing half done."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from command_line import checkpoints, command, metrics, train_ranks
from eapo_megatron import cli
from eapo_megatron.failures import report_failure

SMALL = """
seed: 3
cluster: {gpus_per_node: 2, device: cpu, timeout_minutes: 0.5}
model:
  dtype: float32
  architecture: {model_type: qwen2, vocab_size: 29, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
    num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
parallel: {tensor_model_parallel_size: 2}
data: {task: arithmetic, template: "{prompt}", max_prompt_tokens: 16, arithmetic: {train_size: 64, held_out_size: 8}}
rollout: {num_generations_per_prompt: 2, max_response_tokens: 8}
reward: {num_workers: 1}
train: {steps: 2, num_prompts_per_step: 4, mini_batch_prompts: 4, micro_batch_size: 8}
checkpoint: {every: 1}
logging: {tensorboard: false}
"""
FAILING_RANK = """
import sys
from pathlib import Path
from eapo_megatron.failures import report_failure

print("ready", flush=True)
sys.stdin.read()
try:
    {}["absent"]
except KeyError as error:
    report_failure(error, Path(sys.argv[1]), rank=int(sys.argv[2]))
"""


def test_of_ranks_that_fail_together_one_speaks(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "errors"
    folder.mkdir(parents=True)
    (folder / "rank-7.log").write_text("of an earlier launch")
    time.sleep(0.05)  # its time is before that of the ranks, which the kernel's clock tells in steps of some ms
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING_RANK, folder, str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.close()
    said = [rank.stderr.read() for rank in ranks if rank.stderr is not None]
    assert [rank.wait() for rank in ranks] == [0, 0, 0, 0]
    (first,) = [rank for rank in range(4) if said[rank]]
    assert said[first] == f"error: KeyError: 'absent' (traceback in {folder}/rank-{first}.log)\n"
    for rank in range(4):
        assert (folder / f"rank-{rank}.log").read_text().startswith("Traceback (most recent call last)")


def test_the_log_goes_elsewhere_when_the_run_folder_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").write_text("a file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report_failure(RuntimeError("two\nlines " + "long " * 200), tmp_path / "run" / "errors")
    (log,) = tmp_path.glob("eapo_megatron-*.log")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: RuntimeError: two lines long ")
    assert line.endswith(f"(traceback in {log})")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    report_failure(OSError(28, "No space left on device"), tmp_path / "run" / "errors")
    assert capsys.readouterr().err == f"error: {tmp_path}/run: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyError("absent"), 1, "error: KeyError: 'absent' (traceback in "),
        (OSError(28, "No space left on device", "runs/a/x.pt"), 1, "error: runs/a/x.pt: No space left on device"),
        (MemoryError(), 1, "error: MemoryError: (traceback in "),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_nothing_foresaw_ends_the_command_line(
    error: BaseException,
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "load_recipe", fail)
    monkeypatch.setattr("sys.argv", ["eapo-megatron", "train", "r.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert said.startswith(says)
    assert said.count("\n") == (code != 130)


def test_a_full_disk_in_a_run_is_one_line_and_the_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL.replace("tensorboard: false", f"tensorboard: false, run_dir: {tmp_path}"))
    done = subprocess.run(
        command(recipe, []),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    run = tmp_path / "small"
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {run}/checkpoints/.step_000001 was not written: rank 0: ")
    assert "File too large" in line
    assert f"(traceback in {run}/errors/rank-" in line
    assert "Traceback" not in done.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == []
    train_ranks(recipe)
    assert checkpoints(run) == [1, 2]
    assert [line["step"] for line in metrics(run)][-2:] == [1, 2]


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL.replace("tensorboard: false", f"tensorboard: false, run_dir: {tmp_path}"))
    run = subprocess.Popen(
        command(recipe, ["train.steps=100000"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs in the background
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "small" / "metrics.jsonl").is_file():
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the launcher and all ranks
        _, said = run.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert run.returncode == 130
    assert "Traceback" not in said
    assert "error" not in said
