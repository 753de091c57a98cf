"""The examples for users of other trainers are run as they stand."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TRL = ROOT / ".venv-trl" / "bin" / "python"


def test_the_plain_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "torch_loop.py"), run_name="__main__")
    rates = [float(rate) for rate in re.findall(r"solve rate ([\d.]+)", capsys.readouterr().out)]
    assert len(rates) == 20
    assert rates[0] < 0.1  # 2 % of random responses never fall
    assert min(rates[-3:]) > 0.9


@pytest.mark.skipif(not TRL.exists(), reason="TRL's environment is not here: make .venv-trl/.installed")
def test_trl_trains_on_the_advantages_of_the_paper(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"{a}+{a}=", "answer": str(a + a)} for a in range(1, 17)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = tmp_path / "model"
    make = runpy.run_path(str(ROOT / "recipes" / "helpers" / "tiny_qwen2.py"))["make_checkpoint"]
    make(prompts, model, vocab_size=300)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [str(TRL), str(ROOT / "tests" / "trl_advantages.py"), str(EXAMPLES), str(model), str(prompts)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["errors"]) < 1e-5  # float32 entropies against float64; advantages are about 1
    assert len(found["errors"]) == 2
    for (responses, tokens), largest in found["shapes"]:
        assert responses == 8
        assert tokens > 1
        assert largest > 0.5
    assert found["moved"] > 0
    script = [str(TRL), str(EXAMPLES / "trl_trainer.py"), str(model), str(prompts), "1"]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
