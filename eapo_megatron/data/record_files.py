"""The records of JSON, JSON Lines and Parquet files, one after the other, each with its place in the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eapo_megatron.config import RecipeError
from eapo_megatron.reading import MAX_LINE_BYTES, check_file, read_json, read_json_lines

_PARQUET_ROWS = 256  # read at a time


class DataError(RecipeError):
    """A data file that cannot be used; the message names the file and, where there is one, the line or record."""


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its place in the file, as an error message names it.

    A record of a .jsonl or .parquet file may have 16 MiB; a .json file, which is read at once, 1 GiB.

    Raises:
        RecipeError: naming the file, and the line or record where there is one: a file that is missing, unreadable,
            damaged or of an unknown type, or a record that is no object.
    """
    if path.suffix == ".jsonl":
        records = read_json_lines(path)
    elif path.suffix == ".json":
        records = _json_records(path)
    elif path.suffix == ".parquet":
        records = _parquet_records(path)
    else:
        raise DataError(f"{path}: file type must be .json, .jsonl or .parquet")
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: must be an object, got {type(record).__name__}")
        yield where, record


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: must hold a list of objects, got {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_file(path)
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                if batch.nbytes > MAX_LINE_BYTES:
                    _check_sizes(batch, path, number)
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", record
    # A damaged page may give values that Python cannot hold, and text that is not UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        detail = " ".join(str(error).split())
        raise DataError(f"{path}: not a Parquet file, or damaged behind record {number} ({detail})") from error


def _check_sizes(batch: Any, path: Path, before: int) -> None:
    for row in range(batch.num_rows):
        if batch.slice(row, 1).nbytes > MAX_LINE_BYTES:
            where = f"{path}, record {before + row + 1}"
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes, the longest record that is read")
