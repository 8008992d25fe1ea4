"""The storage below the planner: random layouts, several payload files, what a save refuses, files that shrink."""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megazero.base.errors import CheckpointError
from megazero.engine.boxed import BoxedTensor, Piece, boxed_state
from megazero.engine.checkpoint import load, save
from megazero.engine.manifest import verify_file
from megazero.engine.storage import SectionReader, SectionWriter
from megazero.engine.table import read_table
from megazero.parallel.sharding import Box
from tests.engine.checkpoint_pieces import flat_pieces, payload_of, single, whole_piece, whole_pieces

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def sliced(name: str, tensor: torch.Tensor, cuts: list[int]) -> list[Piece]:
    """The whole tensor as the flat slices between these cuts, as ranks of a ZeRO group hold them together."""
    flat = tensor.reshape(-1)
    bounds = [0, *sorted(cut % (flat.numel() + 1) for cut in cuts), flat.numel()]
    return [p for a, b in pairwise(bounds) for p in flat_pieces(name, tensor.shape, flat[a:b], a)]


def blocks(name: str, tensor: torch.Tensor, dim: int, at: int) -> list[Piece]:
    """The tensor cut in two along a dim, as tensor parallelism cuts it; views that may be non-contiguous."""
    shape = tuple(tensor.shape)
    if not shape:
        return [whole_piece(name, tensor)]
    dim %= len(shape)
    at %= shape[dim] + 1
    pieces = []
    for start, length in ((0, at), (at, shape[dim] - at)):
        box = Box(tuple(start if d == dim else 0 for d in range(len(shape))), (*shape[:dim], length, *shape[dim + 1 :]))
        pieces.append(Piece(name, shape, box, box.of(tensor)))
    return pieces


@settings(max_examples=40)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    saved=st.lists(st.integers(0, 400), max_size=4),
    loaded=st.lists(st.integers(0, 400), max_size=4),
    block=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 5)),
)
@example(shape=(3, 4, 5), dtype=torch.float32, saved=[29], loaded=[13, 41], block=None)
def test_any_layout_loads_any_other(
    shape: tuple[int, ...], dtype: torch.dtype, saved: list[int], loaded: list[int], block: tuple[int, int] | None
) -> None:
    tensor = torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape(shape).to(dtype)
    other = torch.arange(7.0)  # shares the payload file, so that offsets are not all zero
    first = blocks("w", tensor, *block) if block else sliced("w", tensor, saved)
    target = torch.zeros_like(tensor)
    second = sliced("w", target, loaded)
    back = torch.zeros_like(tensor)
    third = blocks("w", back, *(block or (0, 1)))
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        save(folder, 1, {"weights": [whole_piece("other", other), *first]}, {}, "", single())
        rest = whole_piece("other", torch.zeros(7))
        for piece in second:  # each as a rank of its own, which loads only what it holds
            load(folder, 1, {"weights": [piece, rest]}, single())
        load(folder, 1, {"weights": [*third, rest]}, single())
    assert torch.equal(target, tensor)
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([("w", Box((0, 0), (1, 3)))], "hold 3 elements over all ranks"),
        ([("w", Box((0, 0), (2, 3))), ("w", Box((1, 0), (1, 3)))], "Failed to validate global plan"),
        ([("w", Box((0, 0), (2, 3))), ("w", Box((0, 0), (2, 3)))], "Failed to validate global plan"),
        ([("w", Box((1, 0), (2, 3)))], "Failed to validate global plan"),
    ],
    ids=["hole", "overlap", "copy", "outside"],
)
def test_pieces_that_do_not_tile_their_tensor(tmp_path: Path, pieces: list[tuple[str, Box]], message: str) -> None:
    sections = {"weights": [Piece(name, (2, 3), box, torch.zeros(box.shape)) for name, box in pieces]}
    with pytest.raises(RuntimeError, match=message):
        save(tmp_path, 1, sections, {}, "", single())
    assert list(tmp_path.iterdir()) == []


def test_scalar_saved_twice(tmp_path: Path) -> None:
    scalar = whole_piece("s", torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="pieces of s hold 2 elements"):
        save(tmp_path, 1, {"weights": [scalar, scalar]}, {}, "", single())


def test_piece_that_does_not_fit_its_box() -> None:
    with pytest.raises(AssertionError, match="w: memory"):
        Piece("w", (2, 3), Box((0, 0), (2, 3)), torch.zeros(6))
    with pytest.raises(AssertionError, match="w: Box"):
        Piece("w", (6,), Box((0, 0), (2, 3)), torch.zeros(2, 3))


def test_boxed_tensor_reports_the_logical_size_and_computes_nothing() -> None:
    boxed = boxed_state([Piece("w", (40, 30), Box((5, 0), (1, 30)), torch.zeros(1, 30, dtype=torch.bfloat16))])["w"]
    assert isinstance(boxed, BoxedTensor)
    assert boxed.size() == (40, 30)
    assert boxed.dtype == torch.bfloat16
    assert "BoxedTensor(w, (40, 30)" in repr(boxed)
    with pytest.raises(NotImplementedError, match="it only carries boxes"):
        boxed + 1


def write_section(folder: Path, state: dict[str, torch.Tensor], payload_bytes: int) -> SectionWriter:
    writer = SectionWriter(folder, payload_bytes)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(dict(boxed_state(whole_pieces(state))), storage_writer=writer, planner=planner, no_dist=True)
    return writer


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_several_payload_files(tmp_path: Path) -> None:
    state = {f"w{i}": torch.full((100,), float(i)) for i in range(5)} | {"big": torch.ones(1000)}
    writer = write_section(tmp_path, state, payload_bytes=900)
    assert len(writer.files) == 5  # big alone, w0+w1, w2+w3, w4, and the table
    found = {}
    for name, record in writer.files.items():
        verify_file(tmp_path / name, record)
        if name.endswith(".safetensors"):
            with safe_open(tmp_path / name, "pt") as payload:
                found |= {key.split("[")[0]: payload.get_tensor(key) for key in payload.keys()}  # noqa: SIM118
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = SectionReader(tmp_path, read_table(tmp_path))
    dcp.load(dict(boxed_state(whole_pieces(target))), storage_reader=reader, planner=planner, no_dist=True)
    assert all(torch.equal(target[name], state[name]) for name in state)


def test_large_payload_is_written_hashed_and_synced_in_chunks(tmp_path: Path) -> None:
    """More than the sizes at which chunks are hashed and synced (8 and 32 MiB)."""
    state = {"a": torch.randn(5_000_000), "b": torch.randn(7_000_000), "c": torch.randn(3)}
    save(tmp_path, 1, {"weights": whole_pieces(state)}, {}, "", single())
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(tmp_path, 1, {"weights": whole_pieces(target)}, single())
    assert all(torch.equal(target[name], state[name]) for name in state)


def test_columns_load_into_memory_of_their_own(tmp_path: Path) -> None:
    """What a tensor-parallel rank does: its region of the stored box is strided, its memory is not."""
    tensor = torch.arange(24.0).reshape(4, 6)
    save(tmp_path, 1, {"weights": [whole_piece("w", tensor)]}, {}, "", single())
    columns = torch.zeros(4, 2)
    load(tmp_path, 1, {"weights": [Piece("w", (4, 6), Box((0, 3), (4, 2)), columns)]}, single())
    assert torch.equal(columns, tensor[:, 3:5])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_failure_of_any_sync_of_a_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The system tells of a failed write-back once only, so each of the three syncs (two early) must be heard."""
    monkeypatch.setattr("megazero.engine.storage._SYNC_BYTES", 400)
    calls = 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    state = {name: torch.zeros(120) for name in ("a", "b")}
    with pytest.raises(CheckpointError, match=r"Input/output error.*/weights.*give another with --save"):
        save(tmp_path, 1, {"weights": whole_pieces(state)}, {}, "", single())
    assert list(tmp_path.iterdir()) == []


def test_payload_that_shrinks_after_it_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, {"weights": [whole_piece("w", torch.ones(50))]}, {}, "", single())
    payload = payload_of(tmp_path)
    monkeypatch.setattr("megazero.engine.checkpoint._check_same_model", lambda *_: payload.write_bytes(b"short"))
    with pytest.raises(CheckpointError, match=f"{payload.name} was cut short while it was read"):
        load(tmp_path, 1, {"weights": [whole_piece("w", torch.zeros(50))]}, single())
    monkeypatch.setattr("megazero.engine.checkpoint._check_same_model", lambda *_: payload.unlink(missing_ok=True))
    save(tmp_path, 2, {"weights": [whole_piece("w", torch.ones(50))]}, {}, "", single())
    payload = payload_of(tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match=rf"cannot read .*{payload.name}: No such file"):
        load(tmp_path, 2, {"weights": [whole_piece("w", torch.zeros(50))]}, single())


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    save(tmp_path, 1, {"weights": [whole_piece("w", torch.ones(50))]}, {}, "", single())
    state = tmp_path / "step_00000001" / "state.json"
    state.unlink()
    state.symlink_to(state)
    with pytest.raises(CheckpointError, match=r"state.json cannot be read: Too many levels of symbolic links"):
        load(tmp_path, 1, {"weights": [whole_piece("w", torch.zeros(50))]}, single())
    manifest = tmp_path / "step_00000001" / "MANIFEST.json"
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(CheckpointError, match="no whole checkpoint of iteration 1"):
        load(tmp_path, 1, {"weights": [whole_piece("w", torch.zeros(50))]}, single())
