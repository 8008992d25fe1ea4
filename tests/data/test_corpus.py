"""Reading text: every format gives the same documents, in any parts, and bad lines are named by file and line."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import DataError
from megazero.data.corpus import expand_inputs, plan_parts, read_part

TEXTS = ["one", "zwei\nlines", "três 漢字 🙂", "", "x" * 500]
LINES = "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(TEXTS)).encode()


def read(path, keys=("text",), part_bytes=1 << 20, block=1 << 20):
    """(the texts of each document, problems) of a file."""
    parts = plan_parts([str(path)], keys, part_bytes)
    blocks = [found for part in parts for found in read_part(part, keys, block)]
    problems = [str(problem) for found in blocks for problem in found.problems]
    columns = [[text for found in blocks for text in found.columns[k]] for k in range(len(keys))]
    return [list(texts) for texts in zip(*columns, strict=True)], problems


def texts_of(path, **how):
    found, problems = read(path, **how)
    assert problems == []
    return [texts[0] for texts in found]


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.JSONL.zst"])
@pytest.mark.parametrize("data", [LINES, LINES.rstrip(b"\n"), LINES.replace(b"\n", b"\r\n\n  \n")])
def test_json_lines(tmp_path, name, data):
    pack = {"gz": gzip.compress, "st": zstandard.ZstdCompressor().compress}.get(name[-2:], bytes)
    assert texts_of(write(tmp_path / name, pack(data)), block=64) == TEXTS


def test_files_of_several_frames(tmp_path):
    half = LINES.index(b"\n") + 1
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)):
        assert texts_of(write(tmp_path / name, pack(LINES[:half]) + pack(LINES[half:]))) == TEXTS


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12),
    part=st.integers(1, 80),
    block=st.integers(1, 80),
    ascii_only=st.booleans(),
)
def test_any_cut_gives_every_line_once(tmp_path_factory, texts, part, block, ascii_only):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes("".join(json.dumps({"text": t}, ensure_ascii=ascii_only) + "\n" for t in texts).encode())
    assert texts_of(path, part_bytes=part, block=block) == texts


def test_text_files_are_one_document(tmp_path):
    data = "a\nb ü\n".encode()
    assert texts_of(write(tmp_path / "a.txt", data)) == ["a\nb ü\n"]
    assert texts_of(write(tmp_path / "a.txt.gz", gzip.compress(data))) == ["a\nb ü\n"]
    found, problems = read(write(tmp_path / "bad.txt", b"a\nb\n\xff\n"))
    assert (found, problems) == (
        [],
        [f"{tmp_path}/bad.txt:3: not valid UTF-8: invalid start byte; the file is skipped"],
    )


@pytest.mark.parametrize("part_bytes", [1, 10**9])
def test_parquet(tmp_path, part_bytes):
    pq.write_table(pa.table({"text": TEXTS * 3, "other": ["o"] * 15}), tmp_path / "a.parquet", row_group_size=4)
    assert texts_of(tmp_path / "a.parquet", part_bytes=part_bytes) == TEXTS * 3
    assert len(plan_parts([str(tmp_path / "a.parquet")], ["text"], part_bytes)) == (4 if part_bytes == 1 else 1)
    both, _ = read(tmp_path / "a.parquet", keys=("other", "text"))
    assert both[1] == ["o", "zwei\nlines"]
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "n.parquet", row_group_size=1)
    found, problems = read(tmp_path / "n.parquet", part_bytes=1)
    assert (found, problems) == ([["a"], ["b"]], [f"{tmp_path}/n.parquet:2: row 2: 'text' is null"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not valid JSON: Unterminated string starting at at column 10"),
        (b'{"other": 1}', "no key 'text' among ['other']"),
        (b'{"text": 3}', "'text' is int, not text"),
        (b"[1]", "a JSON object is expected, this is list"),
        (b'{"text": "\\ud800"}', "its text has a lone surrogate"),
        (b'{"text": "\xff"}', "not valid UTF-8: invalid start byte at byte 11 of the line"),
        (b"[" * 100000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("part_bytes", [20, 10**9])
def test_bad_lines_are_named(tmp_path, line, reason, part_bytes):
    good = json.dumps({"text": "fine"}).encode()
    path = write(tmp_path / "a.jsonl", b"\n".join([good] * 5 + [b"", line, good]) + b"\n")
    found, problems = read(path, part_bytes=part_bytes, block=30)
    assert found == [["fine"]] * 6
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:7: {reason}")
    found, problems = read(write(tmp_path / "a.jsonl.gz", gzip.compress(path.read_bytes())), block=30)
    assert found == [["fine"]] * 6
    assert problems[0].startswith(f"{path}.gz:7: {reason}")


def test_a_byte_order_mark_is_no_problem(tmp_path):
    assert texts_of(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINES)) == TEXTS


def test_inputs(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "sub/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = expand_inputs([f"{tmp_path}/c.txt", f"{tmp_path}/**/*.jsonl", f"{tmp_path}/a.jsonl"])
    assert [p.removeprefix(f"{tmp_path}/") for p in found] == ["c.txt", "a.jsonl", "b.jsonl", "sub/d.jsonl"]
    for pattern, message in (
        (f"{tmp_path}/no*.jsonl", "no such file, and no file matches"),
        (str(tmp_path), "is a folder. Give its files"),
    ):
        with pytest.raises(DataError, match=message):
            expand_inputs([pattern])
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"a.csv: the format is told by the name, which must end in .jsonl"):
        expand_inputs([f"{tmp_path}/a.csv"])


def test_damaged_files(tmp_path):
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
    for suffix, compress in pack.items():
        for name, data in (("cut", compress(LINES)[:-9]), ("wrong", b"no such thing" * 9)):
            with pytest.raises(DataError, match=rf"{name}.jsonl.{suffix} is damaged or cut short"):
                read(write(tmp_path / f"{name}.jsonl.{suffix}", data))
    with pytest.raises(DataError, match=r"a.parquet cannot be read as .parquet"):
        read(write(tmp_path / "a.parquet", b"nothing"))
    pq.write_table(pa.table({"n": [1]}), tmp_path / "n.parquet")
    for key in ("n", "text"):
        with pytest.raises(DataError, match=f"has no column of text named '{key}'; its columns are .*n.*int64"):
            read(tmp_path / "n.parquet", keys=(key,))
    with pytest.raises(DataError, match=r"has no keys, but --json-keys names 2: a b"):
        read(write(tmp_path / "a.txt", b"x"), keys=("a", "b"))
