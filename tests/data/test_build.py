"""From a config to datasets: splits, blends, mock data, the cache, and errors that every rank raises."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megazero.base.errors import ConfigError, DataError
from megazero.config.schema import DataConfig, LoggingConfig, RunConfig, TransformerConfig
from megazero.data.blend import BlendedDataset
from megazero.data.build import build_datasets
from megazero.data.gpt import GPTDataset
from megazero.data.indexed import IndexedWriter
from megazero.data.mock import MockDataset
from megazero.data.tokenizer import NullTokenizer
from megazero.parallel.topology import Topology

WORLD = Topology.single().group("world")


@pytest.fixture
def prefixes(tmp_path):
    names = [str(tmp_path / name) for name in ("a", "b")]
    for offset, name in enumerate(names):
        with IndexedWriter(name, np.uint16) as writer:
            for i in range(100):
                writer.add_document([100 * offset + i] * 20)
    return names


def config(tmp_path, *path, **data):
    settings = {"seq_length": 16, "split": "80,10,10", "data_path": path, **data}
    return RunConfig(
        model=TransformerConfig(vocab_size=200),
        data=DataConfig(**settings),
        logging=LoggingConfig(output_dir=str(tmp_path / "out")),
    )


def build(settings, tokenizer=None, train=500, valid=20, test=10):
    counts = {"train_samples": train, "valid_samples": valid, "test_samples": test}
    return build_datasets(settings, tokenizer, **counts, group=WORLD)


def test_splits_do_not_share_documents(tmp_path, prefixes):
    found = build(config(tmp_path, prefixes[0]))
    assert isinstance(found.train, GPTDataset)
    assert [len(found.train), len(found.valid), len(found.test)] == [500, 20, 10]
    seen = [
        {int(t) for i in range(len(part)) for t in part[i].tokens} for part in (found.train, found.valid, found.test)
    ]
    assert seen[0] <= set(range(80))
    assert seen[1] <= set(range(80, 90))
    assert seen[2] <= set(range(90, 100))


def test_parts_of_no_samples_are_not_built(tmp_path, prefixes):
    found = build(config(tmp_path, prefixes[0], split="1"), valid=0, test=0)
    assert (found.valid, found.test) == (None, None)
    assert found.train is not None
    with pytest.raises(DataError, match=r"the validation part of .* it has 0 tokens"):
        build(config(tmp_path, prefixes[0], split="1"))


def test_a_longer_run_adds_epochs_to_the_cache_only(tmp_path, prefixes):
    settings = config(tmp_path, prefixes[0])
    entries = tmp_path / "out" / "index-cache"

    def epochs():
        return sorted(json.loads(p.read_text())["key"]["epoch"] for p in entries.glob("*/manifest.json"))

    n = build(settings).train.samples_per_epoch
    build(settings, train=n, valid=0, test=0).train[n - 1]
    assert epochs() == [0]
    before = {p: p.stat().st_mtime_ns for p in entries.glob("*/*.npy")}
    build(settings, train=3 * n, valid=0, test=0).train[3 * n - 1]
    assert epochs() == [0, 2]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    where = replace(settings, data=replace(settings.data, data_cache_path=str(tmp_path / "elsewhere")))
    build(where, train=1, valid=0, test=0).train[0]
    assert list((tmp_path / "elsewhere").glob("*/manifest.json"))


def test_blend(tmp_path, prefixes):
    found = build(config(tmp_path, "0.75", prefixes[0], "0.25", prefixes[1]), train=400)
    assert isinstance(found.train, BlendedDataset)
    from_first = sum(found.train[i].tokens.max() < 100 for i in range(400))
    assert from_first == 300
    by_length = build(config(tmp_path, *prefixes), train=400)
    assert sum(by_length.train[i].tokens.max() < 100 for i in range(400)) == 200


def test_mock_data(tmp_path):
    found = build(config(tmp_path, mock_data=True))
    assert isinstance(found.train, MockDataset)
    assert (found.train[0].tokens != found.valid[0].tokens).any()
    assert found.train[0].tokens.max() < 200
    assert not (tmp_path / "out").exists()


def test_options_reach_the_samples(tmp_path, prefixes):
    flags = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    sample = build(config(tmp_path, prefixes[0], **flags), NullTokenizer(100), valid=0, test=0).train[0]
    assert sample.document_ids is not None
    assert sample.position_ids.max() < 16


def test_errors(tmp_path, prefixes):
    with pytest.raises(DataError, match=r"no.idx does not exist"):
        build(config(tmp_path, "no"))
    with pytest.raises(ConfigError, match=r"--data-path is empty"):
        build(config(tmp_path))
    nameless = replace(config(tmp_path, prefixes[0]), model=TransformerConfig())
    with pytest.raises(ConfigError, match=r"vocabulary's size is not known"):
        build(nameless)
    with pytest.raises(DataError, match=r"token id 99 .*vocabulary of 99"):
        build(nameless, NullTokenizer(99))
    with pytest.raises(ConfigError, match=r"--eod-mask-loss needs a tokenizer"):
        build(config(tmp_path, prefixes[0], eod_mask_loss=True))


def build_with_a_bad_rank(prefix):
    """On 2 ranks: rank 1 has no such file, as on a node whose disk was not filled."""
    group = Topology.build(dp=2).group("world")
    settings = RunConfig(
        model=TransformerConfig(vocab_size=200),
        data=DataConfig(data_path=(prefix if group.rank == 0 else "no/such",), seq_length=16),
    )
    with pytest.raises(DataError) as caught:
        build_datasets(settings, None, train_samples=4, valid_samples=0, test_samples=0, group=group)
    return str(caught.value)


def test_what_one_rank_lacks_stops_all(ranks, prefixes):
    first, second = ranks.run(build_with_a_bad_rank, 2, prefixes[0])
    assert second.startswith("data file no/such.idx does not exist")
    assert first == f"rank 1: {second}"
