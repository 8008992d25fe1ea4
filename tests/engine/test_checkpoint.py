"""One process: what a checkpoint gives back, what it looks like on disk, and every bad input to load."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megazero.base.errors import CheckpointError
from megazero.engine import steps
from megazero.engine.checkpoint import Piece, load, retain, save
from megazero.engine.table import read_table
from megazero.parallel.sharding import Box
from tests.engine.checkpoint_pieces import (
    STATE,
    assert_equal,
    files_of,
    load_weights,
    logical_state,
    payload_of,
    save_step,
    single,
    whole_piece,
    whole_pieces,
    zeros_like,
)


def test_round_trip(store: Path) -> None:
    weights, optimizer = zeros_like(logical_state()), zeros_like(logical_state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = load(store, None, {"weights": whole_pieces(weights), "optimizer": whole_pieces(optimizer)}, single())
    assert state == STATE | {"iteration": 20}
    assert_equal(weights, logical_state(20))
    assert_equal(optimizer, logical_state(20.5))
    assert_equal(load_weights(store, 10), logical_state(10))


def test_layout_on_disk(store: Path) -> None:
    assert sorted(path.name for path in store.iterdir()) == ["latest", "step_00000010", "step_00000020"]
    assert (store / "latest").read_text() == "step_00000020\n"
    folder = store / "step_00000020"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["MANIFEST.json", "config.yaml", "optimizer", "state.json", "weights"]
    assert (folder / "config.yaml").read_text() == "model: tiny\n"
    manifest = json.loads((folder / "MANIFEST.json").read_text())["files"]
    others = [path for path in files_of(folder) if path.name != "MANIFEST.json"]
    assert set(manifest) == {path.relative_to(folder).as_posix() for path in others}
    assert all(manifest[path.relative_to(folder).as_posix()]["size"] == path.stat().st_size for path in others)


def test_no_pickle_and_no_rank_on_disk(store: Path) -> None:
    for path in files_of(store / "step_00000020"):
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK")), f"{path} looks like a pickle or a zip of pickles"
        if path.suffix == ".safetensors":
            assert re.fullmatch(r"[0-9a-f]{64}", path.stem), f"{path} is not named by its content"
            with safe_open(path, "pt") as payload:  # strict: no holes, no overlaps, no bytes left over
                for key in payload.keys():  # noqa: SIM118 - not a dict
                    assert payload.get_tensor(key).dtype == torch.float32
        elif path.suffix == ".json":
            json.loads(content)
        else:
            assert path.name == "config.yaml"
        assert "rank" not in path.name
        assert b"rank" not in content


def test_payload_entries_say_what_they_hold(store: Path) -> None:
    with safe_open(payload_of(store / "step_00000020"), "pt") as payload:
        torch.testing.assert_close(payload.get_tensor("up.weight[0:8, 0:6]"), logical_state(20)["up.weight"])


def test_equal_state_gives_equal_files(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        save_step(tmp_path / directory, 5)
    first, second = (
        {path.relative_to(tmp_path / d): path.read_bytes() for path in files_of(tmp_path / d)} for d in ("a", "b")
    )
    assert first == second


def test_every_dtype_and_mixed_widths(tmp_path: Path) -> None:
    kinds = ["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    state = {kind: (torch.arange(3) % 2).to(getattr(torch, kind)) for kind in kinds}
    state["fp8"] = torch.tensor([1.0, 0.5]).to(torch.float8_e4m3fn)
    save(tmp_path, 1, {"weights": whole_pieces(state)}, {}, "", single())
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(tmp_path, 1, {"weights": whole_pieces(target)}, single())
    assert all(torch.equal(target[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)
    with safe_open(payload_of(tmp_path), "pt") as payload:
        assert len(payload.keys()) == len(state)
    table = read_table(tmp_path / "step_00000001" / "weights")
    assert all(entry.boxes[0].start % entry.dtype.itemsize == 0 for entry in table.values())


def test_dtype_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"saving iteration 1 .*cannot save complex64.*Convert the tensor"):
        save(tmp_path, 1, {"weights": [whole_piece("w", torch.zeros(2, dtype=torch.complex64))]}, {}, "", single())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stored", "wanted"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["down", "up"]
)
def test_dtype_conversion(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 12).reshape(3, 4).to(stored)
    save(tmp_path, 1, {"weights": [whole_piece("w", values)]}, {}, "", single())
    target = torch.zeros(3, 4, dtype=wanted)
    load(tmp_path, 1, {"weights": [whole_piece("w", target)]}, single())
    assert torch.equal(target, values.to(wanted))


def test_non_contiguous_memory_and_parameters(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3))
    save(tmp_path, 1, {"weights": [Piece("w", (3, 4), Box((0, 0), (3, 4)), parameter.t())]}, {}, "", single())
    target = torch.nn.Parameter(torch.zeros(4, 3))
    load(tmp_path, 1, {"weights": [Piece("w", (3, 4), Box((0, 0), (3, 4)), target.t())]}, single())
    assert torch.equal(target, parameter)


def test_fused_memory(tmp_path: Path) -> None:
    """One local tensor holds boxes of three logical ones, as a fused qkv does; it loads into unfused halves."""
    fused = torch.arange(40.0).reshape(10, 4)
    names = {"q": slice(0, 6), "k": slice(6, 8), "v": slice(8, 10)}
    save(tmp_path, 1, {"weights": [whole_piece(n, fused[rows]) for n, rows in names.items()]}, {}, "", single())
    halves = {n: torch.zeros((rows.stop - rows.start) // 2, 4) for n, rows in names.items()}
    lower = [
        Piece(n, (2 * len(t), 4), Box((len(t), 0), tuple(t.shape)), t) for n, t in halves.items()
    ]  # second half of the rows: what tp rank 1 of 2 holds
    load(tmp_path, 1, {"weights": lower}, single())
    for name, rows in names.items():
        assert torch.equal(halves[name], fused[rows][len(halves[name]) :])


def test_overlapping_boxes_of_one_offset_can_be_loaded(tmp_path: Path) -> None:
    values = torch.arange(12.0).reshape(4, 3)
    save(tmp_path, 1, {"weights": [whole_piece("w", values)]}, {}, "", single())
    small, large = torch.zeros(1, 3), torch.zeros(3, 3)
    pieces = [Piece("w", (4, 3), Box((0, 0), (1, 3)), small), Piece("w", (4, 3), Box((0, 0), (3, 3)), large)]
    load(tmp_path, 1, {"weights": pieces}, single())
    assert torch.equal(small, values[:1])
    assert torch.equal(large, values[:3])


def test_pieces_without_elements_are_left_out(tmp_path: Path) -> None:
    values = torch.arange(4.0)
    empty = Piece("w", (4,), Box((0,), (0,)), torch.zeros(0))
    none = whole_piece("none", torch.zeros(0, 3))
    save(tmp_path, 1, {"weights": [empty, whole_piece("w", values), none]}, {}, "", single())
    target = torch.zeros(4)
    load(tmp_path, 1, {"weights": [empty, whole_piece("w", target), none]}, single())
    assert torch.equal(target, values)


def test_all_is_on_the_disk_when_a_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and every folder that got an entry was synced: a power cut loses nothing."""
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    save_step(tmp_path / "ckpt", 10)
    folder = tmp_path / "ckpt" / "step_00000010"
    needed = [tmp_path / "ckpt", *folder.parent.rglob("*")]
    assert [path for path in needed if path.stat().st_ino not in synced] == []


def test_saving_the_same_step_again_replaces_it(store: Path) -> None:
    save_step(store, 20, shift=99)
    assert_equal(load_weights(store), logical_state(99))
    assert sorted(path.name for path in store.iterdir()) == ["latest", "step_00000010", "step_00000020"]


def test_debris_of_killed_runs_is_cleared(store: Path) -> None:
    for name in (".saving_step_00000030", ".saving_step_00000020", ".deleting_step_00000005"):
        (store / name / "weights").mkdir(parents=True)
        (store / name / "weights" / "half").write_text("x")
    shutil.copytree(store / "step_00000010", store / ".replaced_step_00000010")
    save_step(store, 20)
    assert sorted(path.name for path in store.iterdir()) == ["latest", "step_00000010", "step_00000020"]


def test_step_set_aside_by_a_killed_save_still_loads(store: Path) -> None:
    (store / "step_00000020").rename(store / ".replaced_step_00000020")
    assert_equal(load_weights(store), logical_state(20))
    save_step(store, 30)
    assert steps.usable_steps(store) == [10, 20, 30]
    assert (store / "step_00000020").is_dir()


# ---- saving where one cannot, and keeping


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"saving iteration 3 in .*Not a directory.*give another with --save"):
        save_step(tmp_path / "file" / "ckpt", 3)


def test_state_that_is_not_json(store: Path) -> None:
    sections = {"weights": whole_pieces(logical_state())}
    with pytest.raises(RuntimeError, match=r"saving iteration 30 .*TypeError: .*Tensor is not JSON serializable"):
        save(store, 30, sections, {"rng": torch.zeros(2)}, "", single())
    assert sorted(path.name for path in store.iterdir()) == ["latest", "step_00000010", "step_00000020"]


def test_retain(store: Path) -> None:
    save_step(store, 30)
    retain(store, 2)
    assert sorted(path.name for path in store.iterdir()) == ["latest", "step_00000020", "step_00000030"]
    (store / "latest").write_text("step_00000020\n")  # the run went back to it
    retain(store, 1)
    assert steps.usable_steps(store) == [20, 30]
    retain(store, 5)
    assert steps.usable_steps(store) == [20, 30]


def test_retain_deletes_by_rename(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(steps.shutil, "rmtree", killed)
    with pytest.raises(
        CheckpointError, match=r"cannot delete .*step_00000010, which --keep-last no longer keeps: killed"
    ):
        retain(store, 1)
    assert steps.usable_steps(store) == [20]
    monkeypatch.undo()
    save_step(store, 30)
    assert sorted(path.name for path in store.iterdir()) == ["latest", "step_00000020", "step_00000030"]


def test_retain_where_there_is_nothing(tmp_path: Path) -> None:
    retain(tmp_path / "nothing", 1)
    assert not (tmp_path / "nothing").exists()
