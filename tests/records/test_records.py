"""What a run writes of what it sampled."""

from __future__ import annotations

import json
from pathlib import Path

from eapo_megatron.recipe_files import parse_recipe
from eapo_megatron.records.records import SAMPLES_FILE, Records

TEXTS = ["caf\u00e9", "lone \ud800 surrogate", "\udfff", "back\\\ud83dslash", "\u2028\r\n\0", '"']


def test_any_text_is_a_line_of_samples_and_is_kept_on_resuming(tmp_path: Path) -> None:
    settings = {"name": "run", "model": {"path": "m"}, "data": {"task": "arithmetic"}}
    settings["logging"] = {"run_dir": str(tmp_path), "tensorboard": False}
    recipe = parse_recipe(settings, source="r.yaml")
    for first_step, step in ((0, 1), (2, 2)):
        with Records(recipe, first_step=first_step) as records:
            records.log_samples(step, [{"response": text} for text in TEXTS])
    lines = (tmp_path / "run" / SAMPLES_FILE).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == [
        {"step": step, "response": text} for step in (1, 2) for text in TEXTS
    ]
