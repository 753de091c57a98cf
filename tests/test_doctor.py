"""`doctor`, `--version`, shell completion, and the files beside the package that name its version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import eapo_megatron
from eapo_megatron import __main__, doctor

ROOT = Path(__file__).parents[1]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "eapo_megatron", *arguments]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_the_table_says_what_is_installed_and_what_is_used() -> None:
    done = command("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in done.stdout.splitlines()]
    assert {len(cells) for cells in rows} == {2}  # a Markdown table
    found = {name.strip(): value.strip() for name, value in rows}
    assert found["eapo_megatron"] == eapo_megatron.__version__
    assert found["torch"].startswith(torch.__version__)
    assert found["megatron-core imports"] == "yes"
    gpu = torch.cuda.is_available()
    assert found["device, collectives"] == ("cuda, nccl" if gpu else "cpu, gloo")
    assert found["fused head"].split(",")[0] == ("triton" if gpu else "tiles")
    assert found["optimizer"].split(".")[0] in ("torch", "transformer_engine", "apex")
    assert found["rollouts"].startswith("megatron; vllm")


def test_a_broken_package_is_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setenv("PATH", "")
    rows = dict(doctor.diagnose())
    assert re.match(r"no: ModuleNotFoundError: .*megatron", rows["megatron-core imports"])
    assert re.match(r"no: ModuleNotFoundError: .*megatron", rows["optimizer"])
    assert rows["megatron-core"] == "not installed"
    assert rows["SLURM"] == "no sbatch"
    assert rows["GPUs"]  # and the rest is there


def test_a_program_that_fails_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: fatal: no slurm.conf' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = dict(doctor.diagnose())["SLURM"]
    assert said == "no: sbatch ends with code 1 and says: sbatch: fatal: no slurm.conf"


def test_the_version_is_said_in_one_place_and_the_same_everywhere() -> None:
    version = eapo_megatron.__version__
    assert command("--version").stdout == f"{version}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(rf"^## \[{version}\]|first version, {version}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version not in (ROOT / "setup.py").read_text()


def test_the_shell_completes_commands_and_recipes() -> None:
    def completed(*words: str) -> list[str]:
        asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        return command(_EAPO_MEGATRON_COMPLETE="complete_bash", **asked).stdout.split()

    assert completed("eapo-megatron", "doc") == ["doctor"]
    assert completed("eapo-megatron", "train", "eapo-qwen3-8") == ["eapo-qwen3-8b-1n8g-tp2"]


def test_without_its_packages_the_command_says_which_extra_brings_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the command line needs typer: pip install 'eapo_megatron[train]'\n"
