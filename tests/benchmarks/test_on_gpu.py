"""The command for a GPU, on the CPU with small sizes: the same code, whose Triton kernels run in the interpreter."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.on_gpu import __main__ as command
from benchmarks.on_gpu.meter import Check, Findings
from benchmarks.on_gpu.part import PARTS, run_part

pytestmark = pytest.mark.slow
# All parts in one process: importing Megatron takes longer than the parts. The last one has a wrong reference.
SCRIPT = """
import json, sys
from benchmarks.on_gpu import policy
from benchmarks.on_gpu.part import PARTS, run_part

found = {name: run_part(name, "cpu", small=True) for name in PARTS}
reference = policy.log_probs_and_entropies
policy.log_probs_and_entropies = lambda weights, hf_config, *args, **settings: reference(
    weights, {**hf_config, "rope_theta": 100.0}, *args, **settings
)
found["wrong"] = run_part("segments", "cpu", small=True)
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("on_gpu") / "found.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", SCRIPT, str(file)], env=environment, check=True)
    return json.loads(file.read_text())


def targets(part: dict[str, Any]) -> int:
    return sum(check["is_target"] for check in part["checks"])


def test_numbers_are_within_their_bounds(found: dict[str, Any]) -> None:
    for name in PARTS:
        part = found[name]
        assert part["status"] == "ran"
        assert not command.is_wrong(part), [check for check in part["checks"] if not check["passed"]]
        assert all(math.isfinite(value) for _, value in command.leaves(part["numbers"]))
        assert len(list(command.lines_of(name, part | {"seconds": 1.0}))) > len(part["checks"])
    assert [targets(found[name]) for name in PARTS] == [3, 3, 0]
    assert [len(found[name]["checks"]) - targets(found[name]) for name in PARTS] == [20, 5, 4]


def test_the_plan_of_what_stays_is_met(found: dict[str, Any]) -> None:
    """On the CPU other functions hold other activations, but weights, gradients and optimizer state are the same."""
    resident = found["loop"]["numbers"]["bytes"]["resident"]
    assert resident["measured"] == pytest.approx(resident["planned"], rel=0.01)


def test_a_wrong_position_is_noticed(found: dict[str, Any]) -> None:
    assert command.is_wrong(found["wrong"])


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (Check("", 1.0, 2.0), False),
        (Check("", 3.0, 2.0), True),
        (Check("", math.nan, 2.0), True),
        (Check("", 1.0, 2.0, at_least=True), True),
        (Check("", 3.0, 2.0, is_target=True), False),
    ],
)
def test_a_number_outside_its_bound_is_wrong_but_no_target_is(check: Check, wrong: bool) -> None:
    assert command.is_wrong({"status": "ran", **Findings(checks=[check]).as_json()}) == wrong


def test_parts_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "loop", {"no_such_module": "megatron-core"})
    assert run_part("loop", "cpu", small=True) == {
        "status": "did not run",
        "reason": "not installed: megatron-core",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "out"), "--parts", "kernels"]) == 0
    record = json.loads((tmp_path / "out" / "on_gpu.json").read_text())
    assert record["parts"]["kernels"]["reason"] == "PyTorch sees no CUDA device"
    assert record["versions"]["torch"] == torch.__version__
    assert "kernels: did not run: PyTorch sees no CUDA device" in capsys.readouterr().out


def test_a_part_that_ends_with_an_error_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    assert command.main(["--out", str(tmp_path), "--parts", "kernels", "loop"]) == 1
    parts = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
    assert [part["reason"] for part in parts.values()] == ["exit code 1: no output"] * 2


@pytest.mark.parametrize(("seconds", "status"), [(0.0, "did not run"), (0.2, "did not finish")])
def test_the_time_of_the_command_is_bounded(
    seconds: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SECONDS", seconds)
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    assert command.main(["--out", str(tmp_path), "--parts", "kernels", "loop"]) == 0
    parts = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
    assert parts["kernels"]["status"] == status
    assert parts["loop"]["status"] == "did not run"
