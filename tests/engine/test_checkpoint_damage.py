"""Every checkpoint that is missing, damaged or another model's: a clear error with a remedy, nothing half loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megazero.base.errors import CheckpointError
from megazero.engine import steps
from megazero.engine.checkpoint import latest_iteration, load, retain, save
from tests.engine.checkpoint_pieces import (
    assert_equal,
    load_weights,
    logical_state,
    payload_of,
    save_step,
    single,
    whole_pieces,
    zeros_like,
)

# ---- what `latest` may say


@pytest.mark.parametrize("pending", ["", "step_000", "step_00000030\n"])
def test_pending_latest_that_says_nothing_is_no_checkpoint(tmp_path: Path, pending: str) -> None:
    """The first save was killed before its folder had its name."""
    (tmp_path / ".latest").write_text(pending)
    assert latest_iteration(tmp_path) is None
    save_step(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_pending_latest_counts_only_without_a_latest(store: Path) -> None:
    (store / ".latest").write_text("step_00000010\n")
    assert latest_iteration(store) == 20
    (store / "latest").unlink()
    assert latest_iteration(store) == 10
    save_step(store, 30)
    assert latest_iteration(store) == 30


def test_latest_iteration(store: Path, tmp_path: Path) -> None:
    assert latest_iteration(store) == 20
    assert latest_iteration(tmp_path / "nothing here") is None
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".saving_step_00000001").mkdir()
    assert latest_iteration(tmp_path / "empty") is None


@pytest.mark.parametrize("content", ["", "step_", "20", "step_00000020/../x", "\x80\x04", "step_0000002"])
def test_damaged_latest(store: Path, content: str) -> None:
    (store / "latest").write_text(content)
    for call in (latest_iteration, load_weights, lambda folder: retain(folder, 1)):
        with pytest.raises(
            CheckpointError, match=r"latest is damaged: it reads .*Usable steps here: 10, 20; .*--ckpt-step"
        ):
            call(store)
    assert_equal(load_weights(store, 10), logical_state(10))
    assert steps.usable_steps(store) == [10, 20]


def test_latest_of_a_missing_step(store: Path) -> None:
    shutil.rmtree(store / "step_00000020")
    for call in (latest_iteration, load_weights):
        with pytest.raises(
            CheckpointError, match=r"names iteration 20, which is not there\. Usable steps here: 10; .*--ckpt-step"
        ):
            call(store)
    shutil.rmtree(store / "step_00000010")
    with pytest.raises(CheckpointError, match=r"names iteration 20.*No other step here is usable: give another folder"):
        latest_iteration(store)


def test_missing_latest(store: Path) -> None:
    (store / "latest").unlink()
    for call in (latest_iteration, load_weights):
        with pytest.raises(
            CheckpointError, match=r"latest is missing, though .*Usable steps here: 10, 20; .*--ckpt-step"
        ):
            call(store)


def test_latest_that_cannot_be_read(store: Path) -> None:
    (store / "latest").unlink()
    (store / "latest").mkdir()
    with pytest.raises(CheckpointError, match=r"latest cannot be read: Is a directory"):
        latest_iteration(store)


# ---- bad input to load


def test_load_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"loading from .*nothing does not exist: give --load a folder"):
        load_weights(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: give --load a folder"):
        load_weights(tmp_path)


def test_load_a_missing_step(store: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no whole checkpoint of iteration 15\. Usable steps here: 10, 20; "):
        load_weights(store, 15)


def test_load_one_step_as_a_folder_of_steps(store: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is one checkpoint, not a folder of checkpoints: give its parent .*ckpt"
    ):
        load_weights(store / "step_00000010")


def test_load_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint folder .*file: Not a directory"):
        load_weights(tmp_path / "file")


@pytest.mark.parametrize("name", ["state.json", "config.yaml", "weights/tensors.json", "payload"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "too long", "damaged"])
def test_damaged_file(store: Path, name: str, damage: str) -> None:
    folder = store / "step_00000020"
    path = payload_of(folder) if name == "payload" else folder / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(content[:-1])
    elif damage == "too long":
        path.write_bytes(content + b" ")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    target = zeros_like(logical_state())
    with pytest.raises(
        CheckpointError, match=rf"{path.name} is {damage}.*MANIFEST.*Usable steps here: 10; .*--ckpt-step"
    ):
        load(store, None, {"weights": whole_pieces(target)}, single())
    assert_equal(target, zeros_like(logical_state()))  # found before any of it was used
    assert_equal(load_weights(store, 10), logical_state(10))


def test_damage_in_a_section_that_is_not_loaded_does_not_matter(store: Path) -> None:
    for path in (store / "step_00000020" / "optimizer").iterdir():
        path.write_bytes(b"")
    assert_equal(load_weights(store), logical_state(20))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"MANIFEST.json is damaged \(JSONDecodeError"),
        (b"[]", r"MANIFEST.json is damaged \(TypeError"),
        (b'{"\xff"}', r"MANIFEST.json is damaged \(UnicodeDecodeError"),
        (b'{"format": 1, "iteration": 20}', r"MANIFEST.json is damaged \(KeyError: 'files'"),
        (b'{"format": 1, "iteration": 20, "files": {"a": {"size": 1e999, "sha256": ""}}}', r"damaged \(OverflowError"),
        (b'{"format": 2, "iteration": 20, "files": {}}', r"says format 2; this megazero reads format 1\. Use a newer"),
        (b'{"format": 1, "iteration": 21, "files": {}}', r"says iteration 21, but the folder is that of iteration 20"),
    ],
)
def test_damaged_manifest(store: Path, content: bytes, message: str) -> None:
    (store / "step_00000020" / "MANIFEST.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message + r".*Usable steps here: 10; "):
        load_weights(store)


def test_every_flipped_bit_of_the_manifest_is_noticed_or_harmless(store: Path) -> None:
    path = store / "step_00000020" / "MANIFEST.json"
    content = path.read_bytes()
    noticed = 0
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :])
        try:
            assert_equal(load_weights(store), logical_state(20))
        except CheckpointError:
            noticed += 1
    assert noticed > len(content) / 14


def test_missing_manifest_hides_the_step(store: Path) -> None:
    (store / "step_00000020" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"names iteration 20, which is not there\. Usable steps here: 10; "):
        load_weights(store)


def test_missing_section(tmp_path: Path) -> None:
    save(tmp_path, 1, {"weights": whole_pieces(logical_state())}, {}, "", single())
    sections = {"weights": whole_pieces(logical_state()), "optimizer": whole_pieces(logical_state())}
    with pytest.raises(CheckpointError, match=r"holds no optimizer, only weights: .*--finetune"):
        load(tmp_path, 1, sections, single())


def test_checkpoint_of_another_model(store: Path) -> None:
    state = zeros_like(logical_state())
    state["up.weight"] = torch.zeros(8, 5)
    state["scale"] = torch.zeros((), dtype=torch.int64)
    del state["experts"]
    state["lm_head.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError) as caught:
        load(store, 20, {"weights": whole_pieces(state)}, single())
    text = str(caught.value)
    assert "step_00000020 is a checkpoint of another model:" in text
    assert "weights: experts [3, 5, 4] is in the checkpoint, not in the model" in text
    assert "weights: lm_head.weight [2, 2] is not in the checkpoint" in text
    assert "weights: up.weight is [8, 6] in the checkpoint, [8, 5] in the model" in text
    assert "weights: scale is torch.float32 in the checkpoint, torch.int64 in the model" in text
    assert "config.yaml, or give another --load" in text
    assert_equal({"norm.weight": state["norm.weight"]}, {"norm.weight": torch.zeros(7)})


def test_only_the_first_differences_are_listed(store: Path) -> None:
    extra = {f"layers.{i}.weight": torch.zeros(2) for i in range(40)}
    with pytest.raises(CheckpointError, match=r"… and 35 more") as caught:
        load(store, 20, {"weights": whole_pieces(logical_state() | extra)}, single())
    assert str(caught.value).count("\n  - ") == 6
