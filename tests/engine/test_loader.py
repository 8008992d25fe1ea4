"""The order of a user's data: by (seed, epoch) alone, in equal shares, and going on where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from megazero.base.errors import ConfigError
from megazero.engine.loader import Loader, RepeatingLoader
from megazero.parallel.topology import AxisGroup


def group(rank: int, size: int) -> AxisGroup:
    return AxisGroup("dp", tuple(range(size)), rank, None)


def loader(rank: int, size: int, data: Any = range(20), micro: int = 2, **more: Any) -> Loader:
    return Loader(data, group(rank, size), micro_batch_size=micro, **more)


def epoch(size: int, micro: int, **more: Any) -> list[list[int]]:
    """Micro-batches of all ranks, in turn."""
    loaders = [loader(rank, size, micro=micro, **more) for rank in range(size)]
    return [[int(x) for rank in turn for x in rank] for turn in zip(*loaders, strict=True)]


def test_order_does_not_depend_on_ranks_or_micro_batch() -> None:
    (one,) = epoch(1, 20)
    assert sorted(one) == list(range(20)) != one
    for size, micro in [(1, 4), (2, 2), (4, 1), (2, 5)]:
        found = epoch(size, micro)
        step = size * micro
        for index, samples in enumerate(found):
            assert sorted(samples) == sorted(one[index * step : (index + 1) * step])


def test_every_pass_is_another_epoch() -> None:
    data = loader(0, 1, micro=20)
    passes = [next(iter(data)).tolist() for _ in range(3)]
    assert len({tuple(p) for p in passes}) == 3 and data.epoch == 2
    data.set_epoch(1)
    assert next(iter(data)).tolist() == passes[1]
    other = loader(0, 1, micro=20, seed=5)
    assert next(iter(other)).tolist() != passes[0]
    assert next(iter(loader(0, 1, micro=20, shuffle=False))).tolist() == list(range(20))


@pytest.mark.parametrize(("drop", "batches", "samples"), [(False, 6, 11 * 2), (True, 5, 20)])
def test_the_end_of_an_epoch(drop: bool, batches: int, samples: int) -> None:
    both = [loader(rank, 2, range(21), drop_last=drop) for rank in range(2)]
    found = [[int(x) for batch in data for x in batch] for data in both]
    assert [len(data) for data in both] == [batches] * 2
    assert len(found[0]) == len(found[1]) == samples / 2
    assert len(set(found[0] + found[1])) == (20 if drop else 21)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_going_on_with_other_ranks(cut: int) -> None:
    data = loader(0, 1, micro=4)
    straight = [batch.tolist() for batch in data] + [batch.tolist() for batch in data]
    data = loader(0, 1, micro=4)
    for _, _batch in zip(range(cut), data, strict=False):
        pass
    state = data.state()
    assert state == {"epoch": 0, "samples": 4 * cut}
    both = [loader(rank, 2) for rank in range(2)]
    for one in both:
        one.load(state)
    found = [sorted(int(x) for part in turn for x in part) for turn in zip(*both, strict=True)]
    found += [sorted(int(x) for part in turn for x in part) for turn in zip(*both, strict=True)]
    assert found[: 10 - cut] == [sorted(batch) for batch in straight[cut:]][: 10 - cut]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(7))


def test_streams() -> None:
    both = [loader(rank, 2, Stream()) for rank in range(2)]
    assert [[batch.tolist() for batch in data] for data in both] == [[[0, 2], [4, 6]], [[1, 3], [5]]]
    with pytest.raises(TypeError, match="no length"):
        len(both[0])
    again = loader(0, 1, Stream())
    again.load({"epoch": 0, "samples": 4})
    assert [batch.tolist() for batch in again] == [[4, 5], [6]]
    assert isinstance(again.dataset, Stream)


def test_collate_and_repeating() -> None:
    data = loader(0, 1, micro=5, collate_fn=lambda samples: {"x": torch.tensor(samples)})
    assert data.batch_size == 5 and data.dataset == range(20)
    repeating = RepeatingLoader(data)
    assert [next(repeating)["x"].shape for _ in range(9)] == [(5,)] * 9
    assert data.epoch == 2 and iter(repeating) is repeating
    with pytest.raises(ConfigError, match="gives no batch at all"):
        next(RepeatingLoader([]))


def test_too_little_data() -> None:
    with pytest.raises(ConfigError, match=r"has 3 samples, and a micro-batch of 2 on each of 2 ranks takes 4 or more"):
        loader(0, 2, range(3), drop_last=True)
    with pytest.raises(ConfigError, match=r"has 0 samples"):
        loader(0, 1, [])
