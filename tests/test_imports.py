"""The floors of the package: a file imports from its own floor or below, and no files import each other in a circle.

Every import statement counts: those for type checkers and those inside functions too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "eapo_megatron"

# From the ground up: the rooms (folders) and files of each floor.
FLOORS = (
    {
        "algorithms",
        "vocab_parallel",
        "data",
        "config",
        "recipe_files",
        "recipe_keys",
        "saved_recipe",
        "durable",
        "reading",
        "failures",
        "stopping",
        "checksums",
        "run_lock",
        "megatron_compat",
    },
    {"rewards", "weights", "slurm", "launcher"},
    {"policy"},
    {"rollout"},
    {"records"},
    {"evaluation", "training", "report", "planning"},
    {"__main__", "cli", "doctor", "ranks", "recipe_table"},
    {"integrations", "benchmarks"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}
TORCH_ALONE = ("algorithms", "vocab_parallel")
# The arrows that run upward all the same, each with its reason.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(file): file
    for folder in (PACKAGE, "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file != ROOT / PACKAGE / "__init__.py"
}


def imports(module: str) -> set[str]:
    """The modules that a file names in import statements; of `from room import file` the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join([*package_of(module, node.level), *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else source for name in names}
    return found


def package_of(module: str, level: int) -> list[str]:
    """What a relative import of so many dots starts from."""
    parts = module.split(".")
    if FILES[module].name == "__init__.py":
        parts.append("__init__")
    return parts[:-level] if level else []


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE else parts[0]


ARROWS = sorted((module, target) for module in FILES for target in imports(module) if target in FILES)


def test_every_file_has_a_floor() -> None:
    assert {room_of(module) for module in FILES} <= FLOOR.keys()


def test_no_file_imports_from_a_floor_above() -> None:
    upward = {(module, target) for module, target in ARROWS if FLOOR[room_of(target)] > FLOOR[room_of(module)]}
    assert upward == EXCEPTIONS.keys()


def test_no_circle_of_files() -> None:
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for module, target in ARROWS:
        graph[module].add(target)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("room", TORCH_ALONE)
def test_a_room_of_torch_alone_imports_nothing_else(room: str) -> None:
    allowed = {"torch", "triton"} | sys.stdlib_module_names  # triton comes with torch for GPUs
    of_others = {
        (module, target)
        for module in FILES
        if room_of(module) == room
        for target in imports(module)
        if target.split(".")[0] not in allowed and room_of(target) != room
    }
    assert of_others == set()


def test_a_report_needs_neither_megatron_nor_transformers() -> None:
    asks = "import eapo_megatron.report.report, sys; print(*{'megatron', 'transformers'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert (found.stdout.strip(), found.stderr) == ("", "")
