"""Which rank sees which sample in which step: independent of the layout, and resumed exactly."""

from __future__ import annotations

import pytest
import torch

from megazero.base.errors import ConfigError, DataError
from megazero.data.loader import GlobalBatches
from megazero.data.mock import MockDataset
from megazero.data.sample import SampleOptions


def mock(n=50):
    options = SampleOptions(reset_attention_mask=True)
    return MockDataset(num_samples=n, seq_length=16, vocab_size=64, seed=1, part=0, options=options)


def batches(rank=0, dp=1, mbs=2, gbs=12, consumed=0, data=None):
    return GlobalBatches(
        data or mock(),
        micro_batch_size=mbs,
        global_batch_size=gbs,
        dp_rank=rank,
        dp_size=dp,
        consumed_samples=consumed,
    )


def rows(step):
    """{place in the global batch: tokens} of one rank's micro-batches."""
    return {int(i): tuple(row) for b in step for i, row in zip(b.sample_index, b.tokens.tolist(), strict=True)}


def test_the_assignment_is_megatrons():
    for rank in (0, 1, 2):
        step = next(batches(rank, dp=3))
        assert [b.sample_index.tolist() for b in step] == [[6 * m + 2 * rank, 6 * m + 2 * rank + 1] for m in (0, 1)]


@pytest.mark.parametrize(("dp", "mbs"), [(1, 1), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_a_global_batch_is_the_same_on_every_layout(dp, mbs):
    expected = [rows(step) for step in batches()]
    assert len(expected) == 4
    data = mock()
    assert list(expected[1].values())[5] == tuple(data[17].tokens.tolist())
    ranks = [list(batches(r, dp, mbs)) for r in range(dp)]
    for step in range(4):
        together: dict = {}
        for rank in ranks:
            together |= rows(rank[step])
        assert together == expected[step]


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_resume_is_exact(done):
    whole = list(batches())
    resumed = batches(consumed=12 * done)
    assert resumed.consumed_samples == 12 * done
    rest = list(resumed)
    assert len(rest) == 4 - done
    for a, b in zip(whole[done:], rest, strict=True):
        for x, y in zip(a, b, strict=True):
            for name in vars(x):
                assert torch.equal(getattr(x, name), getattr(y, name))


def test_consumed_samples_count_what_was_given_out():
    it = batches()
    for step in (1, 2, 3, 4):
        next(it)
        assert it.consumed_samples == 12 * step
    with pytest.raises(StopIteration):
        next(it)
    with pytest.raises(StopIteration):
        next(it)


def test_a_batch_has_the_promised_types():
    batch = next(batches())[0].to("cpu", non_blocking=True)
    assert [batch.tokens.dtype, batch.labels.dtype, batch.position_ids.dtype] == [torch.int64] * 3
    assert (batch.loss_mask.dtype, batch.document_ids.dtype, batch.sample_index.dtype) == (
        torch.float32,
        torch.int32,
        torch.int64,
    )
    assert batch.tokens.shape == batch.document_ids.shape == (2, 16)
    plain = MockDataset(num_samples=9, seq_length=4, vocab_size=9, seed=1, part=0, options=SampleOptions())
    assert next(batches(gbs=2, data=plain))[0].to("cpu").document_ids is None


def test_an_error_in_reading_reaches_the_loop():
    class Broken:
        def __len__(self):
            return 24

        def __getitem__(self, index):
            if index >= 12:
                raise DataError("sample 12 is bad")
            return mock()[index]

    it = batches(data=Broken())
    next(it)
    with pytest.raises(DataError, match=r"sample 12 is bad"):
        next(it)


def test_indivisible_batch():
    with pytest.raises(ConfigError, match=r"global batch of 12 .* = 2 · 5"):
        batches(dp=5)


def test_a_part_of_each_sample():
    """Context parallelism: some places of each sample; document ids of all of them."""
    part = torch.tensor([0, 1, 14, 15])
    whole = list(batches())
    cut = list(GlobalBatches(mock(), micro_batch_size=2, global_batch_size=12, dp_rank=0, dp_size=1, part=part))
    assert len(cut) == len(whole) == 4
    pairs = [pair for steps in zip(whole, cut, strict=True) for pair in zip(*steps, strict=True)]
    for all_of, some in pairs:
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(getattr(some, name), getattr(all_of, name)[:, part]), name
        assert torch.equal(some.document_ids, all_of.document_ids)
        assert torch.equal(some.sample_index, all_of.sample_index)
