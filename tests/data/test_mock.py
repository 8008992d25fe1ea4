"""Synthetic samples: a function of (seed, index), within the vocabulary, and learnable."""

from __future__ import annotations

import numpy as np
import pytest

from megazero.data.mock import MockDataset
from megazero.data.sample import SampleOptions


def mock(**changes):
    settings = {
        "num_samples": 100,
        "seq_length": 64,
        "vocab_size": 512,
        "seed": 3,
        "part": 0,
        "options": SampleOptions(),
    }
    return MockDataset(**{**settings, **changes})


def test_a_sample_depends_on_seed_part_and_index_only():
    one = mock()
    assert (one[7].tokens == mock(num_samples=8)[7].tokens).all()
    for other in (mock(seed=4)[7], mock(part=1)[7], one[8]):
        assert (one[7].tokens != other.tokens).any()
    with pytest.raises(IndexError):
        one[100]


def test_tokens_are_in_the_vocabulary_and_mostly_follow_from_the_last():
    data = mock(num_samples=300)
    text = np.stack([data[i].tokens for i in range(300)])
    assert text.min() >= 0
    assert text.max() < 512
    pairs = np.stack([text[:, :-1].ravel(), text[:, 1:].ravel()])
    count = np.zeros((512, 512))
    np.add.at(count, tuple(pairs), 1)
    assert 0.85 < count.max(axis=1).sum() / count.sum() < 0.97
    assert data[0].loss_mask.all()


def test_documents_and_masked_labels():
    options = SampleOptions(True, True, True, eod=5)
    data = mock(options=options, num_samples=50)
    ids = np.concatenate([data[i].document_ids for i in range(50)])
    assert ids.max() > 1
    assert all((data[i].loss_mask == (data[i].tokens != 5)).all() for i in range(50))
    masked = mock(mask_fraction=0.25)
    share = np.mean([masked[i].loss_mask.mean() for i in range(100)])
    assert 0.7 < share < 0.8
    assert (masked[3].tokens == mock()[3].tokens).all()
