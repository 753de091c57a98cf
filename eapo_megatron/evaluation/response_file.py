"""The responses of an evaluation on disk: one JSON line each, which is all that scoring needs.

responses.jsonl    benchmark, problem (its place in the benchmark's file), sample, text, tokens (how many),
                   finished (false: cut at the maximum length), reward (null: no verdict)
evaluation.json    what the responses depend on; the file goes on only where it is the same
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import new_file, write_json
from eapo_megatron.reading import read_json_lines, read_json_object

FIELDS = {
    "benchmark": (str,),
    "problem": (int,),
    "sample": (int,),
    "text": (str,),
    "tokens": (int,),
    "finished": (bool,),
    "reward": (int, float, type(None)),
}
_TAIL_BYTES = 2**16

Key = tuple[str, int, int]  # benchmark, problem, sample


class ResponseFile:
    """responses.jsonl of one folder; one process writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "responses.jsonl"

    def open(self, origin: Mapping[str, Any]) -> None:
        """Makes the folder ready to go on: a last line that a kill has torn is removed.

        `origin` is what the responses depend on; benchmarks that are new to the folder join its evaluation.json.

        Raises:
            RecipeError: naming the first value that differs from that of the responses that are there.
        """
        about = self.folder / "evaluation.json"
        before = read_json_object(about) if about.is_file() else {}
        for key in before.keys() & origin.keys():
            if before[key] != origin[key]:
                raise RecipeError(
                    f"{self.folder} holds another evaluation: {key} was {before[key]!r} there and is {origin[key]!r} "
                    "here; give another --out"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(about, {**before, **origin})
        if self.path.is_file():
            self._remove_torn_line()

    def records(self) -> Iterator[dict[str, Any]]:
        """Every response, in the order of the file.

        Raises:
            RecipeError: naming the file and the line of a record that is not whole.
        """
        if not self.path.is_file():
            return
        for where, record in read_json_lines(self.path):
            if not isinstance(record, dict) or record.keys() != FIELDS.keys():
                raise RecipeError(f"{where}: is no response with {', '.join(FIELDS)}")
            for field, types in FIELDS.items():
                if type(record[field]) not in types:
                    raise RecipeError(f"{where}: {field} must not be {record[field]!r}")
            yield record

    def keys(self) -> set[Key]:
        """The responses that are there."""
        return {(record["benchmark"], record["problem"], record["sample"]) for record in self.records()}

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes responses behind the others, on disk when it returns."""
        with self.path.open("ab") as file:
            file.write(b"".join(_line(record) for record in records))
            file.flush()
            os.fsync(file.fileno())

    def replace(self, records: Iterator[Mapping[str, Any]]) -> None:
        """Puts other records in the place of all, at once: a kill leaves the old ones."""
        with new_file(self.path) as file:
            for record in records:
                file.write(_line(record))

    def _remove_torn_line(self) -> None:
        with self.path.open("rb+") as file:
            end = size = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - _TAIL_BYTES)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                end = start if newline < 0 else start + newline + 1
                if newline >= 0:
                    break
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
