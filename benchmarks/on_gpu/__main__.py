"""Checks and measures on one NVIDIA GPU, in under 8 minutes, without a network.

    python -m benchmarks.on_gpu --out DIR

Writes DIR/on_gpu.json after every part, a log of each part beside it, and prints a table. The exit code is 1 where a
number is outside a bound of correctness or a part ended with an error; targets of speed and memory are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.measuring import circumstances
from benchmarks.on_gpu.part import PARTS
from eapo_megatron.durable import write_json

ROOT = Path(__file__).parents[2]
SECONDS = 465.0  # of all parts
DISTRIBUTIONS = ("torch", "triton", "megatron-core")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, made if it is not there")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes: a test of the command, no measurement")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        **circumstances(),
        "gpu": gpu() if options.device == "cuda" else None,
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "device": options.device,
        "small": options.small,
        "parts": {},
    }
    start = time.monotonic()
    for name in options.parts:
        began = time.monotonic()
        found = run_in_process(name, options, left=SECONDS - (began - start))
        record["parts"][name] = found | {"seconds": time.monotonic() - began}
        record["seconds"] = time.monotonic() - start
        write_json(options.out / "on_gpu.json", record)
        print("\n".join(lines_of(name, record["parts"][name])), flush=True)
    return int(any(is_wrong(part) for part in record["parts"].values()))


def gpu() -> dict[str, str] | None:
    """Card, driver and memory, as the driver's own program says; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    names = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(names, lines[0].split(", "), strict=False)) if lines else None


def version(distribution: str) -> str | None:
    """None: it is not installed."""
    found = next(iter(metadata.distributions(name=distribution)), None)
    return None if found is None else found.version


def run_in_process(name: str, options: argparse.Namespace, *, left: float) -> dict[str, Any]:
    """What a part found, in a process that ends after `left` seconds at the latest."""
    if left <= 0:
        return {"status": "did not run", "reason": f"the {SECONDS:.0f} seconds of the command were over"}
    log = options.out / f"{name}.log"
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder, log.open("w") as file:
        result = Path(folder) / "part.json"
        sizes = "small" if options.small else "full"
        command = [sys.executable, "-m", "benchmarks.on_gpu.part", name, options.device, sizes, str(result)]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": search}
        )
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return {"status": "did not finish", "reason": f"the {SECONDS:.0f} seconds of the command were over"}
        if code == 0:
            return json.loads(result.read_text())
    written = log.read_text(errors="replace").strip().splitlines()
    return {"status": "failed", "reason": f"exit code {code}: {written[-1] if written else 'no output'}"}


def is_wrong(part: dict[str, Any]) -> bool:
    """Whether a part ended with an error or a number is outside its bound of correctness."""
    checks = part.get("checks", [])
    return part["status"] == "failed" or any(not check["passed"] and not check["is_target"] for check in checks)


def lines_of(name: str, part: dict[str, Any]) -> Iterator[str]:
    """A part's rows of the table."""
    yield f"{name}: {part['status']}{': ' + part['reason'] if 'reason' in part else ''} ({part['seconds']:.0f} s)"
    for check in part.get("checks", []):
        kind = (
            ("met" if check["passed"] else "missed") if check["is_target"] else ("ok" if check["passed"] else "WRONG")
        )
        sign = ">=" if check["at_least"] else "<="
        yield f"  {kind:<6}  {check['name']:<62}  {check['value']:>10.3g}  {sign} {check['bound']:g}"
    for path, value in leaves(part.get("numbers", {})):
        yield f"          {path:<62}  {value:>10.4g}"


def leaves(numbers: dict[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested ones, by its path."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}: ")
        else:
            yield f"{path}{name}", value


if __name__ == "__main__":
    sys.exit(main())
