"""The .bin/.idx format: its bytes, what is read back, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazero.base.errors import DataError
from megazero.data.indexed import DTYPES, IndexedDataset, IndexedWriter, merge, optimal_dtype


def golden_idx(code: int, itemsize: int) -> bytes:
    """Three sequences of 2, 0 and 3 tokens in two documents, written out by hand."""
    head = (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", 3)
        + struct.pack("<Q", 3)
    )
    pointers = struct.pack("<3q", 0, 2 * itemsize, 2 * itemsize)
    return head + struct.pack("<3i", 2, 0, 3) + pointers + struct.pack("<3q", 0, 2, 3)


def write_golden(prefix: Path, dtype: str = "<u2") -> None:
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_document([1, 2], [2, 0])
        writer.add_document([3, 4, 500 if dtype == "<u2" else 5])


def test_written_bytes_are_the_format(tmp_path):
    write_golden(tmp_path / "a")
    assert (tmp_path / "a.idx").read_bytes() == golden_idx(8, 2)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<5H", 1, 2, 3, 4, 500)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_code_is_read(tmp_path, code):
    letters = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}
    size = struct.calcsize(letters[code])
    (tmp_path / "a.idx").write_bytes(golden_idx(code, size))
    (tmp_path / "a.bin").write_bytes(struct.pack(f"<5{letters[code]}", 1, 2, 3, 4, 5))
    data = IndexedDataset(tmp_path / "a")
    assert [data[i].tolist() for i in range(3)] == [[1, 2], [], [3, 4, 5]]
    assert (len(data), data.num_tokens, data.document_indices.tolist()) == (3, 5, [0, 2, 3])
    assert data.get(2, 1, 1).tolist() == [4]
    write_golden(tmp_path / "b", DTYPES[code].str)
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()


def test_dtype_follows_megatrons_bound():
    assert optimal_dtype(65499) == np.uint16
    assert optimal_dtype(65500) == np.int32


def test_dtype_without_a_code_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"uint32 has no code"):
        IndexedWriter(tmp_path / "a", np.uint32)


@settings(max_examples=25)
@given(documents=st.lists(st.lists(st.integers(0, 65499), max_size=9), max_size=12), parts=st.integers(1, 4))
def test_round_trip_and_merge(tmp_path_factory, documents, parts):
    folder = tmp_path_factory.mktemp("merge")
    names = []
    for number, some in enumerate(np.array_split(np.arange(len(documents)), parts)):
        names.append(folder / f"part{number}")
        with IndexedWriter(names[-1], np.uint16) as writer:
            chosen = [documents[i] for i in some]
            writer.add_documents(np.array([t for d in chosen for t in d], np.int64), np.array([len(d) for d in chosen]))
    merge(names, folder / "all")
    with IndexedWriter(folder / "whole", np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    for suffix in (".bin", ".idx"):
        assert Path(f"{folder}/all{suffix}").read_bytes() == Path(f"{folder}/whole{suffix}").read_bytes()
    assert [x.tolist() for x in IndexedDataset(folder / "all")] == documents


def test_an_exception_leaves_nothing(tmp_path):
    write_golden(tmp_path / "a")
    before = (tmp_path / "a.idx").read_bytes()

    def fail() -> None:
        with IndexedWriter(tmp_path / "a", np.int32) as writer:
            writer.add_document([7])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a.idx").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_nothing_appears_before_close(tmp_path):
    writer = IndexedWriter(tmp_path / "a", np.int32)
    writer.add_document([7])
    assert not {"a.bin", "a.idx"} & {p.name for p in tmp_path.iterdir()}
    writer.close()
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [7]


def test_merge_refuses_none_and_mixed_types(tmp_path):
    with pytest.raises(DataError, match=r"nothing to join"):
        merge([], tmp_path / "x")
    write_golden(tmp_path / "a", "<u2")
    write_golden(tmp_path / "b", "<i4")
    with pytest.raises(DataError, match=r"cannot join .*b \(int32\) to .*x \(uint16\)"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "x")


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*writable folder"):
        IndexedWriter(tmp_path / "file" / "a", np.int32)


def damage(tmp_path: Path, idx: bytes, binary: bytes = struct.pack("<5H", 1, 2, 3, 4, 5)) -> Path:
    (tmp_path / "a.idx").write_bytes(idx)
    (tmp_path / "a.bin").write_bytes(binary)
    return tmp_path / "a"


GOOD = golden_idx(8, 2)


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (b"garbage and more of it", "is not an index of tokens: it starts with b'garbage a'"),
        (b"", "is not an index of tokens"),
        (GOOD[:20], "cut short: its header needs 34 bytes, the file has 20"),
        (GOOD[:-1], r"cut short: 3 sequences and 3 document indices need 94 bytes, the file has 93"),
        (GOOD + b"12345", "too long: .* need 94 bytes, the file has 99"),
        (GOOD + b"123", "multimodal index: 3 bytes more than the 94"),
        (GOOD[:9] + struct.pack("<Q", 2) + GOOD[17:], "has index version 2; only version 1"),
        (GOOD[:17] + b"\x09" + GOOD[18:], "has dtype code 9; the codes are 1 to 8"),
        (GOOD[:-8] + struct.pack("<q", 7), "document indices must run from 0 to its 3 sequences, they are 0 … 7"),
    ],
)
def test_damaged_index(tmp_path, idx, message):
    with pytest.raises(DataError, match=message):
        IndexedDataset(damage(tmp_path, idx))


def test_index_without_documents(tmp_path):
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 0, 0)
    with pytest.raises(DataError, match=r"they are none"):
        IndexedDataset(damage(tmp_path, head, b""))


def test_bin_that_does_not_match(tmp_path):
    with pytest.raises(
        DataError, match=r"cut short or does not match .*needs 10 bytes \(5 tokens of uint16\), the file has 9"
    ):
        IndexedDataset(damage(tmp_path, GOOD, b"123456789"))
    with pytest.raises(DataError, match=r"a.bin does not match .*needs 10 bytes .*the file has 11"):
        IndexedDataset(damage(tmp_path, GOOD, b"12345678901"))


def test_sequence_outside_the_bin(tmp_path):
    bad = GOOD[:46] + struct.pack("<3q", 0, 4, 6) + GOOD[70:]
    with pytest.raises(DataError, match=r"sequence 2 has 3 tokens at byte 6, but .* has 10 bytes"):
        IndexedDataset(damage(tmp_path, bad)).check_index()


def test_missing_files_say_what_may_be_meant(tmp_path):
    with pytest.raises(DataError, match=r"x.idx does not exist. Give the prefix"):
        IndexedDataset(tmp_path / "x")
    write_golden(tmp_path / "c_text_document")
    with pytest.raises(DataError, match=r"did you mean .*c_text_document"):
        IndexedDataset(tmp_path / "c")
    with pytest.raises(DataError, match=r"without the suffix: .*c_text_document$"):
        IndexedDataset(tmp_path / "c_text_document.bin")
    (tmp_path / "c_text_document.bin").unlink()
    with pytest.raises(DataError, match=r"c_text_document.bin does not exist"):
        IndexedDataset(tmp_path / "c_text_document")
