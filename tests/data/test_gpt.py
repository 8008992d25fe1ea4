"""Packing: what a sample holds, that order depends on (seed, epoch) only, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import ConfigError, DataError
from megazero.data.gpt import GPTDataset, TokenFile, build_epoch, permutation, split_bounds
from megazero.data.index_cache import IndexCache
from megazero.data.indexed import IndexedWriter
from megazero.data.sample import SampleOptions, make_sample

VOCABULARY = 60000


def write(folder, documents, dtype=np.uint16, name="d"):
    with IndexedWriter(folder / name, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(folder / name)


def dataset(prefix, num_samples=10**6, seq_length=8, seed=1, bounds=None, options=None, cache=None):
    file = TokenFile(prefix, VOCABULARY)
    return GPTDataset(
        file,
        bounds or (0, len(file.data)),
        name="train",
        num_samples=num_samples,
        seq_length=seq_length,
        seed=seed,
        options=options or SampleOptions(),
        cache=IndexCache(cache),
    )


def text(sample):
    return [*sample.tokens.tolist(), int(sample.labels[-1])]


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40), s=st.integers(1, 12), epoch=st.integers(0, 3))
def test_an_epoch_cuts_the_shuffled_documents_into_windows(lengths, s, epoch):
    """Against the drawing, done slowly: concatenate, cut, compare as sets; each window once."""
    arrays = build_epoch(np.array(lengths, np.int32), 5, s, 11, epoch)
    tokens = [(d, t) for d in arrays["documents"] for t in range(lengths[d - 5])]
    starts = [(int(arrays["documents"][p]), int(o)) for p, o in arrays["starts"]]
    expected = [tokens[k * s] for k in range(max(len(tokens) - 1, 0) // s)]
    assert sorted(starts) == sorted(expected)
    assert sorted(arrays["documents"]) == list(range(5, 5 + len(lengths)))


def test_samples_hold_consecutive_tokens_and_share_one(tmp_path):
    lengths = [5, 0, 17, 1, 0, 30, 9]
    stream = np.arange(sum(lengths))
    prefix = write(tmp_path, np.split(stream, np.cumsum(lengths)[:-1]))
    data = dataset(prefix)
    arrays = data._epoch(0)
    order = np.concatenate([data.file.data[i] for i in arrays["documents"]]).tolist()
    n = data.samples_per_epoch
    assert n == (62 - 1) // 8
    assert sorted(text(data[i]) for i in range(n)) == sorted(order[k * 8 : k * 8 + 9] for k in range(n))
    assert all((data[i].tokens[1:] == data[i].labels[:-1]).all() for i in range(n))
    assert data[0].tokens.dtype == data[0].labels.dtype == data[0].position_ids.dtype == np.int64
    assert data[0].loss_mask.dtype == np.float32


@given(seed=st.integers(0, 2**31), few=st.integers(1, 40), more=st.integers(1, 200))
def test_a_longer_run_changes_nothing_before(shared_prefix, seed, few, more):
    short, long = dataset(shared_prefix, few, seed=seed), dataset(shared_prefix, few + more, seed=seed)
    for i in {0, few // 2, few - 1}:
        assert text(short[i]) == text(long[i])
    with pytest.raises(IndexError):
        short[few]


@pytest.fixture(scope="module")
def shared_prefix(tmp_path_factory):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCABULARY, rng.integers(0, 40)) for _ in range(60)]
    return write(tmp_path_factory.mktemp("shared"), documents)


def test_order_depends_on_seed_and_epoch(shared_prefix):
    data, other = dataset(shared_prefix), dataset(shared_prefix, seed=2)
    n = data.samples_per_epoch
    first, second = [text(data[i]) for i in range(n)], [text(data[n + i]) for i in range(n)]
    assert first != second
    assert first != [text(other[i]) for i in range(n)]
    assert first == [text(dataset(shared_prefix)[i]) for i in range(n)]


def test_permutation_is_this_for_ever():
    """Written down: a change of these numbers would change the data order of every resumed run."""
    assert permutation(8, 1234, 0, 0).tolist() == [5, 6, 3, 7, 4, 1, 2, 0]
    assert permutation(8, 1234, 1, 0).tolist() == [2, 0, 7, 6, 1, 4, 5, 3]


def test_document_masks(tmp_path):
    prefix = write(tmp_path, [[1, 2, 9], [], [3, 4, 5, 9], [6, 7, 9, 8, 8, 9]])
    options = SampleOptions(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True, eod=9)
    sample = dataset(prefix, seq_length=12, options=options)[0]
    starts, positions, document = [], [], -1
    for i, token in enumerate(sample.tokens.tolist()):
        if i == 0 or sample.tokens[i - 1] == 9:
            document, start = document + 1, i
        starts.append(document)
        positions.append(i - start)
        assert sample.loss_mask[i] == (token != 9)
    assert sample.document_ids.tolist() == starts
    assert sample.position_ids.tolist() == positions
    assert document == 3
    assert sample.document_ids.dtype == np.int32


def test_documents_without_eod_are_told_by_the_index(tmp_path):
    prefix = write(tmp_path, [[1] * 3, [2] * 4, [3] * 6])
    sample = dataset(prefix, seq_length=12, options=SampleOptions(reset_attention_mask=True))[0]
    assert (np.diff(sample.document_ids) == (np.diff(sample.tokens) != 0)).all()
    assert sample.position_ids.tolist() == list(range(12))
    assert sample.loss_mask.all()


def test_no_masks_by_default():
    sample = make_sample(np.array([1, 9, 2, 3]), np.array([2]), SampleOptions(eod=9))
    assert sample.document_ids is None
    assert sample.position_ids.tolist() == [0, 1, 2]
    assert sample.loss_mask.tolist() == [1, 1, 1]


def test_split_is_megatrons():
    assert split_bounds("969,30,1", 1000) == [(0, 969), (969, 999), (999, 1000)]
    assert split_bounds("8, 1, 1", 7) == [(0, 6), (6, 6), (6, 7)]
    assert split_bounds("1", 7) == [(0, 7), (7, 7), (7, 7)]


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf"])
def test_split_that_is_none(split):
    with pytest.raises(ConfigError, match=r"--split .*give relative sizes"):
        split_bounds(split, 10)


def test_sequence_longer_than_the_corpus(tmp_path):
    prefix = write(tmp_path, [[1, 2, 3], [4, 5]])
    assert dataset(prefix, seq_length=4).samples_per_epoch == 1
    with pytest.raises(DataError, match=r"the train part of .* it has 5 tokens in 2 of 2 documents, .*\+ 1 = 6"):
        dataset(prefix, seq_length=5)
    with pytest.raises(DataError, match=r"has 0 tokens in 0 of 2 documents"):
        dataset(prefix, seq_length=1, bounds=(2, 2))


def test_empty_corpus(tmp_path):
    with pytest.raises(DataError, match=r"is empty: there are no tokens"):
        TokenFile(write(tmp_path, []), 10)
    with pytest.raises(DataError, match=r"is empty: there are no tokens"):
        TokenFile(write(tmp_path, [[], []], name="e"), 10)


def test_ids_outside_the_vocabulary_are_found_at_once(tmp_path):
    prefix = write(tmp_path, [[1, 2], [3, 50]])
    assert TokenFile(prefix, 51)
    with pytest.raises(
        DataError, match=r"token id 50 .*outside the vocabulary of 50 ids \(0 to 49\).*--tokenizer-model"
    ):
        TokenFile(prefix, 50)
    with pytest.raises(DataError, match=r"token id -3"):
        TokenFile(write(tmp_path, [[1, -3]], np.int32, "n"), 50)
    with pytest.raises(DataError, match=r"holds float32 numbers"):
        TokenFile(write(tmp_path, [[1.0]], np.float32, "f"), 50)


def test_an_id_between_the_blocks_looked_at_is_found_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megazero.data.gpt._BLOCK", 8)
    monkeypatch.setattr("megazero.data.gpt._BLOCKS", 2)
    documents = [[1] * 50, [1] * 50]
    documents[1][25] = 59999
    data = dataset(write(tmp_path, documents), seq_length=20)
    data.file.vocab_size = 59999
    data.file._read_fingerprint()  # the blocks looked at are fine
    with pytest.raises(DataError, match=r"token id 59999 \(in sequences [01, ]*1"):
        [data[i] for i in range(data.samples_per_epoch)]


def test_fingerprint_is_of_the_content(tmp_path):
    one = TokenFile(write(tmp_path, [[1, 2], [3]], name="a"), 10).fingerprint
    assert one == TokenFile(write(tmp_path, [[1, 2], [3]], name="b"), 10).fingerprint
    assert one != TokenFile(write(tmp_path, [[1, 2], [4]], name="c"), 10).fingerprint
    assert one != TokenFile(write(tmp_path, [[1], [2, 3]], name="d"), 10).fingerprint
