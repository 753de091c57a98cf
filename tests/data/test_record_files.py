"""Data files that cannot be read: one sentence that names the file, and the line or record."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eapo_megatron import reading
from eapo_megatron.config import RecipeError
from eapo_megatron.data import load_examples, record_files

GOOD = '{"problem": "caf\u00e9?", "answer": "1"}\n'
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as refused:
        load_examples(path)
    sentence = str(refused.value)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence
    return sentence.removeprefix(str(path))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", GOOD.encode("latin-1"), ", line 1: the text is not UTF-8 (byte 0xe9 at 16)"),
        ("a.jsonl", GOOD.encode() + GOOD.encode("latin-1"), ", line 2: the text is not UTF-8"),
        ("a.jsonl", GOOD.encode("utf-16"), ", line 1: the text is UTF-16"),
        ("a.json", b"[" + GOOD.encode("latin-1") + b"]", ": the text is not UTF-8"),
        ("a.json", f"[{GOOD}]".encode("utf-16-be"), ": the text is not UTF-8"),
        ("a.json", f"[{GOOD}]".replace("\u00e9", "e").encode("utf-16-be"), ": malformed JSON"),
        ("a.json", b"\xfe\xff" + f"[{GOOD}]".encode("utf-16-be"), ": the text is UTF-16"),
        ("a.jsonl", b"[" * 100_000, ", line 1: JSON nested too deeply"),
        ("a.json", b"[" * 100_000, ": JSON nested too deeply"),
        ("a.jsonl", b'{"problem": "?", "answer": ' + b"1" * 5000 + b"}", ", line 1: malformed JSON (Exceeds the limit"),
        ("a.jsonl", LFS.encode(), " is a Git LFS pointer, not the file itself"),
        ("a.json", LFS.encode(), " is a Git LFS pointer, not the file itself"),
        ("a.parquet", LFS.encode(), " is a Git LFS pointer, not the file itself"),
        ("a.jsonl", b'{"problem": "\\ud800?", "answer": "1"}', ", line 1: field 'problem' holds a lone surrogate"),
        ("a.jsonl", b'{"problem": "?", "answer": ["1", "\\udfff"]}', ", line 1: field 'answer' holds a lone surrogate"),
        ("a.parquet", b"PAR1", ": not a Parquet file, or damaged"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(sentence)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", GOOD), ("a.json", f"[{GOOD}]")):
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
        assert load_examples(tmp_path / name).examples[0].prompt == "caf\u00e9?"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_folders_devices_and_the_systems_own_words(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    assert refusal(path) == ": no such file"
    path.mkdir()
    assert refusal(path) == " is a folder, not a file"
    path.rmdir()
    path.symlink_to("/dev/null")
    assert refusal(path) == " is not a regular file"
    path.unlink()
    path.touch()

    def forbidden(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    assert refusal(path) == ": Permission denied"


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_damaged_parquet_pages(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "hurt.parquet"
    table = pa.Table.from_pylist([{"problem": f"q{i}?", "answer": str(i)} for i in range(300)])
    pq.write_table(table, path, compression=compression, write_page_checksum=True)
    hurt = bytearray(path.read_bytes())
    hurt[20:200] = bytes(180)
    path.write_bytes(hurt)
    assert refusal(path).startswith(": not a Parquet file, or damaged behind record 0 (")


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.array([b"1?", b"caf\xe9?"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"problem": raw, "answer": ["1", "2"]}), path)
    assert re.match(r": not a Parquet file, or damaged behind record 0 \(.*utf-8", refusal(path))


def test_parquet_is_read_batch_by_batch(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"problem": f"q{i}?", "answer": str(i)} for i in range(1000)]), path)
    assert [example.answer for example in load_examples(path).examples] == [str(i) for i in range(1000)]


def test_giant_records_are_refused_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reading, record_files):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1000)
    giant = {"problem": "x" * 2000, "answer": "1"}
    (tmp_path / "a.jsonl").write_text(GOOD + str(giant))  # no JSON: it is not parsed
    assert refusal(tmp_path / "a.jsonl") == ", line 2: longer than 1000 bytes, the longest record that is read"
    pq.write_table(pa.Table.from_pylist([giant | {"problem": "short"}, giant]), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == ", record 2: longer than 1000 bytes, the longest record that is read"
    (tmp_path / "a.json").write_text(str([giant]))
    assert refusal(tmp_path / "a.json").startswith(" has 20")
