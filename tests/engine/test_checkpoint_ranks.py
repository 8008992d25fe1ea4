"""Several ranks: any layout loads what any other saved; what goes wrong on one rank is an error on all, at once."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megazero.base.errors import CheckpointError
from megazero.engine.checkpoint import Piece, latest_iteration, load, save
from megazero.parallel.sharding import Box, split
from megazero.parallel.topology import AxisGroup
from tests.engine.checkpoint_pieces import (
    assert_equal,
    files_of,
    flat_pieces,
    logical_state,
    payload_of,
    single,
    whole_piece,
    whole_pieces,
    zeros_like,
)
from tests.harness import RankFailure, Ranks


def world() -> AxisGroup:
    if not dist.is_initialized():
        return single()
    return AxisGroup("world", tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def my_slice(numel: int, group: AxisGroup) -> tuple[int, int]:
    """Flat range of this rank, as even as whole elements allow; some ranks of a small tensor get nothing."""
    return numel * group.rank // group.size, numel * (group.rank + 1) // group.size


def sliced_pieces(state: dict[str, torch.Tensor], group: AxisGroup) -> tuple[list[Piece], dict[str, torch.Tensor]]:
    """This rank's flat slice of every tensor (copied), and the memory of the slices."""
    pieces, memory = [], {}
    for name, tensor in state.items():
        start, stop = my_slice(tensor.numel(), group)
        memory[name] = tensor.reshape(-1)[start:stop].clone()
        pieces += flat_pieces(name, tensor.shape, memory[name], start)
    return pieces, memory


def save_slices(directory: str, iteration: int, shift: float) -> None:
    group = world()
    weights, _ = sliced_pieces(logical_state(shift), group)
    optimizer, _ = sliced_pieces(logical_state(shift + 0.5), group)
    save(directory, iteration, {"weights": weights, "optimizer": optimizer}, {"shift": shift}, "", group)


def load_slices(directory: str, shift: float) -> None:
    group = world()
    weights, mine = sliced_pieces(zeros_like(logical_state()), group)
    optimizer, mine_too = sliced_pieces(zeros_like(logical_state()), group)
    state = load(directory, None, {"weights": weights, "optimizer": optimizer}, group)
    assert state == {"shift": shift}
    assert_equal(mine, sliced_pieces(logical_state(shift), group)[1])
    assert_equal(mine_too, sliced_pieces(logical_state(shift + 0.5), group)[1])


def save_tensor_parallel(directory: str, iteration: int) -> None:
    """A matrix split along dim 1, a vector split along dim 0, and a scalar that the last rank owns."""
    group = world()
    state = logical_state()
    pieces = []
    for name, dim in (("up.weight", 1), ("experts", 0)):
        box = split(dim, tuple(state[name].shape), group.rank, group.size)
        pieces.append(Piece(name, tuple(state[name].shape), box, box.of(state[name])))
    if group.rank == group.size - 1:
        pieces += whole_pieces({name: state[name] for name in ("norm.weight", "scale")})
    save(directory, iteration, {"weights": pieces}, {}, "", group)


def load_whole(directory: str) -> None:
    target = zeros_like(logical_state())
    load(directory, None, {"weights": whole_pieces(target)}, world())
    assert_equal(target, logical_state())


def load_own_stage(directory: str) -> None:
    """As pipeline stages do: each rank asks for some of the tensors only."""
    group = world()
    target = {n: t for i, (n, t) in enumerate(zeros_like(logical_state()).items()) if i % group.size == group.rank}
    load(directory, None, {"weights": whole_pieces(target)}, group)
    assert_equal(target, {name: logical_state()[name] for name in target})


def test_flat_slices_of_two_ranks_load_on_one_three_and_two(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_slices, 2, str(tmp_path), 10, 7.0)
    for size in (3, 2, 1):
        ranks.run(load_slices, size, str(tmp_path), 7.0)
    names = {str(path.relative_to(tmp_path)) for path in files_of(tmp_path)}
    payload = {name for name in names if name.endswith(".safetensors")}
    assert len(payload) == 4  # one file of each rank in each section
    target = zeros_like(logical_state())  # the test process, which has no process group
    assert load(tmp_path, 10, {"weights": whole_pieces(target)}, single()) == {"shift": 7.0}
    assert_equal(target, logical_state(7))


def test_tensor_parallel_boxes_load_whole_and_by_stage(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_tensor_parallel, 3, str(tmp_path), 1)
    ranks.run(load_whole, 2, str(tmp_path))
    ranks.run(load_own_stage, 2, str(tmp_path))


def save_single_and_load_sliced(directory: str) -> None:
    """A subgroup of one member inside a larger world saves alone; all load."""
    everyone = world()
    if everyone.rank == 1:
        alone = AxisGroup("tp", (1,), 0, None)
        save(directory, 1, {"weights": whole_pieces(logical_state())}, {}, "", alone)
    dist.barrier()
    pieces, mine = sliced_pieces(zeros_like(logical_state()), everyone)
    load(directory, None, {"weights": pieces}, everyone)
    assert_equal(mine, sliced_pieces(logical_state(), everyone)[1])


def test_a_group_of_one_inside_a_world(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_single_and_load_sliced, 2, str(tmp_path))


def save_with_an_empty_piece(directory: str) -> None:
    """Rank 0's slice of the tensor is empty, at the offset of rank 1's box."""
    group = world()
    tensor = torch.arange(6.0).reshape(2, 3)
    box = Box((0, 0), (2 * group.rank, 3))
    save(directory, 1, {"weights": [Piece("w", (2, 3), box, box.of(tensor))]}, {}, "", group)
    target = torch.zeros(2, 3)
    load(directory, 1, {"weights": [Piece("w", (2, 3), box, box.of(target))]}, group)
    assert torch.equal(target, tensor if group.rank else torch.zeros(2, 3))


def test_an_empty_piece_does_not_hide_another_ranks_box(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_with_an_empty_piece, 2, str(tmp_path))


def save_unequal_numbers_of_pieces(directory: str) -> None:
    """One row on rank 0, three on rank 1: the plan numbers boxes over all ranks, memory is looked up on one."""
    group = world()
    tensor = torch.arange(12.0).reshape(4, 3)
    rows = [0] if group.rank == 0 else [1, 2, 3]
    save(
        directory,
        1,
        {"weights": [Piece("w", (4, 3), Box((r, 0), (1, 3)), tensor[r : r + 1]) for r in rows]},
        {},
        "",
        group,
    )
    target = torch.zeros(4, 3)
    load(directory, 1, {"weights": [whole_piece("w", target)]}, group)
    assert torch.equal(target, tensor)


def test_unequal_numbers_of_pieces(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_unequal_numbers_of_pieces, 2, str(tmp_path))


# ---- one rank's trouble is everybody's


def save_with_rank_1_out_of_room(directory: str) -> str:
    """Rank 1 may write no file of more than 4 KiB: a real error of the system, in the middle of a write."""
    group = world()
    pieces = [whole_piece(f"w{group.rank}", torch.randn(1 << 16))]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(directory, 20, {"weights": pieces}, {}, "", group)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return str(caught.value)


def test_disk_full_on_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_slices, 2, str(tmp_path), 10, 1.0)
    texts = ranks.run(save_with_rank_1_out_of_room, 2, str(tmp_path))
    assert texts[0] == texts[1]
    for part in ("saving iteration 20 in", "(rank 1)", "File too large", "/weights", "give another with --save"):
        assert part in texts[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000010"]
    ranks.run(load_slices, 2, str(tmp_path), 1.0)


def save_to_a_folder_that_others_do_not_see(directory: str) -> str:
    """Rank 1 stands for a node with a disk of its own: the folder that rank 0 made is not there."""
    group = world()
    own = directory if group.rank == 0 else directory + "-of-another-node"
    with pytest.raises(CheckpointError) as caught:
        save(own, 1, {"weights": [whole_piece(f"w{group.rank}", torch.zeros(3))]}, {}, "", group)
    return str(caught.value)


def test_folder_that_is_not_shared(ranks: Ranks, tmp_path: Path) -> None:
    texts = ranks.run(save_to_a_folder_that_others_do_not_see, 2, str(tmp_path / "ckpt"))
    assert all("(rank 1)" in text and "No such file or directory" in text for text in texts)
    assert all("must be on storage that every rank sees" in text for text in texts)
    assert latest_iteration(tmp_path / "ckpt") is None
    assert list((tmp_path / "ckpt").iterdir()) == []


def save_to_an_unwritable_folder(directory: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        save_slices(directory, 1, 0.0)
    return str(caught.value)


def test_unwritable_folder(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    texts = ranks.run(save_to_an_unwritable_folder, 2, str(tmp_path / "file" / "ckpt"))
    assert all("(rank 0)" in text and "Not a directory" in text for text in texts)


def save_badly(directory: str, kind: str) -> str:
    """What our own code might do wrong; every rank must hear of it."""
    group = world()
    w = torch.arange(12.0).reshape(4, 3)
    half = split(0, (4, 3), group.rank, group.size)
    pieces = [Piece("w", (4, 3), half, half.of(w))]
    if kind == "copy":  # both ranks own the same box
        pieces = [whole_piece("w", w)]
    elif kind == "hole":
        box = Box((0, 0), (1, 3)) if group.rank == 0 else half
        pieces = [Piece("w", (4, 3), box, box.of(w))]
    elif kind == "overlap":
        box = Box((0, 0), (3, 3)) if group.rank == 0 else half
        pieces = [Piece("w", (4, 3), box, box.of(w))]
    elif kind == "copy and hole":  # the right number of elements, of which two boxes are equal
        pieces = [Piece("w", (4, 3), Box((0, 0), (2, 3)), w[:2])]
    elif kind == "shape" and group.rank == 1:
        pieces = [Piece("w", (5, 3), half, half.of(w))]
    elif kind == "dtype" and group.rank == 1:
        pieces = [Piece("w", (4, 3), half, half.of(w.bfloat16()))]
    elif kind == "disagreement on one rank" and group.rank == 1:
        pieces.append(Piece("w", (4, 3), half, half.of(w.double())))
    elif kind == "sections":
        with pytest.raises(AssertionError) as caught:
            save(directory, 1, {"weights" if group.rank else "optimizer": pieces}, {}, "", group)
        return str(caught.value)
    with pytest.raises(RuntimeError) as error:
        save(directory, 1, {"weights": pieces}, {}, "", group)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("copy", "pieces of w hold 24 elements over all ranks (12 without repeated boxes), the tensor 12"),
        ("copy and hole", "Failed to validate global plan"),
        ("hole", "Failed to validate global plan"),
        ("overlap", "Failed to validate global plan"),
        ("shape", "ranks disagree in shape or dtype of w"),
        ("dtype", "ranks disagree in shape or dtype of w"),
        ("disagreement on one rank", "pieces of w disagree in shape or dtype"),
        ("sections", "ranks save or load different things"),
    ],
)
def test_internal_errors_reach_every_rank(ranks: Ranks, tmp_path: Path, kind: str, message: str) -> None:
    texts = ranks.run(save_badly, 2, str(tmp_path), kind)
    assert texts[0] == texts[1]
    assert message in texts[0]
    assert latest_iteration(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def load_damaged(directory: str) -> str:
    group = world()
    pieces, mine = sliced_pieces(zeros_like(logical_state()), group)
    with pytest.raises(CheckpointError) as caught:
        load(directory, None, {"weights": pieces}, group)
    assert_equal(mine, sliced_pieces(zeros_like(logical_state()), group)[1])
    return str(caught.value)


def test_damage_found_by_one_rank_is_told_to_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_slices, 2, str(tmp_path), 10, 0.0)
    for path in files_of(tmp_path):
        if path.parent.name == "weights":
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            texts = ranks.run(load_damaged, 3, str(tmp_path))
            assert len(set(texts)) == 1
            assert f"{path.name} is damaged" in texts[0]
            path.write_bytes(content)
    payload_of(tmp_path).unlink()
    texts = ranks.run(load_damaged, 2, str(tmp_path))
    assert texts[0] == texts[1]
    assert "is missing, though MANIFEST.json lists it" in texts[0]


def load_another_model(directory: str) -> str:
    """Only rank 1's tensors differ, and one tensor of the checkpoint is on no rank."""
    group = world()
    state = zeros_like(logical_state())
    mine = (
        {"up.weight": state["up.weight"]}
        if group.rank == 0
        else {"scale": torch.zeros(2), "norm.weight": state["norm.weight"]}
    )
    with pytest.raises(CheckpointError) as caught:
        load(directory, None, {"weights": whole_pieces(mine)}, group)
    return str(caught.value)


def test_another_model_is_told_to_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_slices, 2, str(tmp_path), 10, 0.0)
    texts = ranks.run(load_another_model, 2, str(tmp_path))
    assert texts[0] == texts[1]
    assert "experts [3, 5, 4] is in the checkpoint, not in the model" in texts[0]
    assert "scale is [] in the checkpoint, [2] in the model" in texts[0]
    assert "norm.weight" not in texts[0]
    assert "up.weight" not in texts[0]


def save_while_rank_1_dies(directory: str) -> None:
    group = world()
    pieces, _ = sliced_pieces(logical_state(5.0), group)
    if group.rank == 1:
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # in the middle of its payload file
    save(directory, 20, {"weights": pieces}, {}, "", group)


def test_rank_killed_while_it_writes(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_slices, 2, str(tmp_path), 10, 1.0)
    with pytest.raises(RankFailure, match="rank 1 was killed by signal 9"):
        ranks.run(save_while_rank_1_dies, 2, str(tmp_path))
    assert latest_iteration(tmp_path) == 10
    ranks.run(load_slices, 2, str(tmp_path), 1.0)
    ranks.run(save_slices, 2, str(tmp_path), 20, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000010", "step_00000020"]
