"""`eapo-megatron`, and `python -m eapo_megatron`: the command line, or one sentence where its packages are missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("megatron", "omegaconf", "pydantic", "rich", "typer")  # what the extra `train` brings to every command


def main() -> None:
    """Runs the command line; exit code 2 where the package was installed without the extra `train`."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"error: the command line needs {', '.join(missing)}: pip install 'eapo_megatron[train]'", file=sys.stderr
        )
        sys.exit(2)
    from eapo_megatron.cli import main as run

    run()


if __name__ == "__main__":
    main()
