"""README and docs: every block runs or says what it needs, and the names in the text are those of the code.

A fenced block is `sh`, `python`, `yaml` (a part of a recipe) or `text`. `<!-- needs: WHAT -->` before one says what it
needs beside this machine; such a block is not run. The commands of `sh` blocks are run by `make test-docs`.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main

from eapo_megatron.cli import app
from eapo_megatron.config import Recipe
from eapo_megatron.recipe_files import load_recipe
from eapo_megatron.recipe_keys import recipe_keys

ROOT = Path(__file__).parents[1]
FIRST = "eapo-qwen2-tiny-arithmetic-1n2g-tp2"
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
FILES.append(ROOT / "recipes" / "README.md")
NEEDS = {"network", "gpu", "slurm", "vllm", "nemo", "data", "hours", "run"}  # run: what `make test-docs` has made
LANGUAGES = {"sh", "python", "yaml", "text"}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    place: str  # FILE:LINE
    language: str
    needs: str | None
    text: str


def blocks_of(file: Path) -> Iterator[Block]:
    lines = file.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        needs = re.fullmatch(r"<!-- needs: (.+) -->", lines[start - 1])
        place = f"{file.relative_to(ROOT)}:{start + 1}"
        language = lines[start].strip().removeprefix("```")
        yield Block(place, language, needs and needs[1], "\n".join(lines[start + 1 : number]) + "\n")
        start = None
    assert start is None, f"{file}: a block does not end"


BLOCKS = [block for file in FILES for block in blocks_of(file)]
PROSE = {file: re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE) for file in FILES}
INLINE = [(file, code) for file, text in PROSE.items() for code in re.findall(r"`([^`\n]+)`", text)]


def of(language: str, *, needs: str | None = None) -> list[Any]:
    found = [block for block in BLOCKS if block.language == language and block.needs == needs]
    return [pytest.param(block, id=block.place) for block in found]


def test_readme_is_short_and_blocks_say_what_they_are() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    for block in BLOCKS:
        assert block.language in LANGUAGES, block.place
        assert block.needs is None or block.needs in NEEDS, block.place
    for file, text in PROSE.items():
        assert not re.findall(r"(?<=\n\n)    .*", text), f"{file}: an indented block has no language"
    assert len(of("sh")) >= 10
    assert len(of("python")) >= 3


@pytest.mark.parametrize("block", of("python"))
def test_python_runs(block: Block) -> None:
    exec(compile(block.text, block.place, "exec"), {})


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_a_part_of_a_recipe(block: Block, tmp_path: Path) -> None:
    inherits = "defaults:" not in block.text
    recipe = tmp_path / "part.yaml"
    recipe.write_text((f"defaults: {FIRST}\n" if inherits else "") + block.text)
    load_recipe(recipe, ["data.task=null"] if inherits and "train_path" in block.text else [])


def commands() -> Iterator[tuple[str, str]]:
    """Every command of ours in blocks and in the text."""
    for block in BLOCKS:
        if block.language in ("sh", "text"):
            for line in block.text.splitlines():
                if "eapo-megatron " in line:
                    yield block.place, line[line.index("eapo-megatron ") :].partition(" #")[0]
    for file, code in INLINE:
        if code.startswith("eapo-megatron "):
            yield str(file.relative_to(ROOT)), code


def test_commands_and_options_exist() -> None:
    program: Any = typer.main.get_command(app)
    seen = set()
    for place, line in commands():
        words = shlex.split(line.replace("[", " ").replace("]", " ").replace("'", ""))[1:]
        command = program
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        seen.add(command.name)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        if command is program:
            known |= {"--install-completion", "--show-completion"}
            assert words, f"{place}: {line}"
            assert words[0] in known | {"doctor"}, f"{place}: {line}"
        if command.name != "submit":  # which passes sbatch's own on
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert options <= known, f"{place}: {line}"
    assert seen >= {"train", "plan", "submit", "report", "check", "to-hf", "from-hf", "evaluate", "serve", "keys"}


def test_targets_modules_files_and_links_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE):
            assert target in targets, f"{file}: make {target}"
        for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
            assert find_spec(module), f"{file}: {module}"
        for path in re.findall(r"`((?:tests|benchmarks|recipes|launch|constraints|examples)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{file}: {path}"
        for target in re.findall(r"\]\(([^)#\s:]+)[^):]*\)", PROSE[file]):
            assert (file.parent / target).exists(), f"{file}: {target}"


def test_every_result_has_its_place() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    results = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert {name for name in results if f"`{name}`" not in page} == set()


def test_keys_in_the_text_exist() -> None:
    keys = {key.path for key in recipe_keys()}
    sections = {name for name in Recipe.model_fields if any(key.startswith(f"{name}.") for key in keys)}
    parts = {path.rpartition(".")[0] for path in keys}
    for file, code in INLINE:
        for path in re.findall(rf"(?<![\w./])(?:{'|'.join(sections)})\.[a-z_.]+[a-z](?![\w/(:*])", code):
            if path.endswith((".sbatch", ".py", ".json", ".jsonl", ".sh")):
                continue
            assert path in keys | parts, f"{file}: {path}"


def test_sentences_of_troubleshooting_are_the_codes() -> None:
    """Each is looked for between its dots, in the text of one string of the package."""
    strings = set()
    for file in (ROOT / "eapo_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                strings.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = text.partition("## Numbers that look wrong")[0]
    sentences = re.findall(r"^\| `([^`]+)` \|", tables, re.MULTILINE)
    assert len(sentences) > 40
    for sentence in sentences:
        pieces = [piece.strip() for piece in sentence.split("...") if piece.strip()]
        longest = max(pieces, key=len)
        pattern = re.compile(r".*".join(map(re.escape, pieces)), re.DOTALL)
        assert len(longest) >= 9, sentence
        assert any(pattern.search(string) for string in strings), sentence


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An empty folder beside the repository's examples, where a command trains a few steps in place of all."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("examples", "launch", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    script = folder / "bin" / "eapo-megatron"
    script.parent.mkdir()
    small = (
        "warm_start.steps=4 train.steps=2 train.num_prompts_per_step=4 train.mini_batch_prompts=2 evaluation.every=0"
    )
    script.write_text(
        "#!/usr/bin/env bash\n"
        f'if [[ $1 == train && "$*" != *--dry-run* ]]; then set -- "$@" {small}; fi\n'
        f'exec {sys.executable} -m eapo_megatron "$@"\n'
    )
    script.chmod(0o755)
    path = os.pathsep.join([str(script.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return folder, inherited | {"PATH": path, "PYTHONPATH": search}


@pytest.mark.docs
@pytest.mark.parametrize("block", [*of("sh"), *of("python", needs="run")])
def test_blocks_run_one_after_the_other(block: Block, workplace: tuple[Path, dict[str, str]]) -> None:
    folder, environment = workplace
    program = ["bash", "-euc"] if block.language == "sh" else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, block.text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block.place}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
