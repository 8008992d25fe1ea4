"""The run's train, validation and test samples, from its config.

Every rank opens the files itself. What is wrong on any of them is raised on all, so that none is left waiting.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megazero.base.errors import ConfigError, DataError
from megazero.base.log import Log
from megazero.config.schema import RunConfig
from megazero.data.blend import BlendedDataset, parse_data_path, whole_shares
from megazero.data.gpt import GPTDataset, TokenFile, split_bounds
from megazero.data.index_cache import IndexCache
from megazero.data.mock import MockDataset
from megazero.data.sample import SampleOptions, SampleSource
from megazero.data.tokenizer import Tokenizer
from megazero.parallel.collectives import gather_objects
from megazero.parallel.topology import AxisGroup

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Datasets:
    """The parts of which samples were asked for; None for the others."""

    train: SampleSource | None
    valid: SampleSource | None
    test: SampleSource | None


def build_datasets(
    config: RunConfig,
    tokenizer: Tokenizer | None,
    *,
    train_samples: int,
    valid_samples: int,
    test_samples: int,
    group: AxisGroup,
) -> Datasets:
    """Datasets of exactly these lengths (0: None). Collective over `group`, all ranks of the run.

    `tokenizer` gives the vocabulary and the end-of-document id; None leaves them to config.model.vocab_size and none.
    Raises, on every rank, the DataError or ConfigError that any rank met.
    """
    counts = (train_samples, valid_samples, test_samples)
    parts: list[SampleSource | None] = []
    problem: DataError | ConfigError | None = None
    try:
        parts = _build(config, tokenizer, counts, Log(group.ranks[group.rank]))
    except (DataError, ConfigError) as error:
        problem = error
    problems = gather_objects(None if problem is None else str(problem), group)
    if problem is not None:
        raise problem
    for rank, text in enumerate(problems):
        if text is not None:
            raise DataError(f"rank {group.ranks[rank]}: {text}")
    return Datasets(*parts)


def _build(
    config: RunConfig, tokenizer: Tokenizer | None, counts: tuple[int, int, int], log: Log
) -> list[SampleSource | None]:
    data = config.data
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    if vocab_size < 1:
        raise ConfigError("the vocabulary's size is not known. Set --vocab-size, or --tokenizer-model.")
    options = SampleOptions(
        data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss, tokenizer.eod if tokenizer else None
    )
    if data.eod_mask_loss and options.eod is None:
        raise ConfigError(
            "--eod-mask-loss needs a tokenizer with an end-of-document token. Leave it out, or change the tokenizer."
        )
    if data.mock_data:
        return [
            MockDataset(
                num_samples=count, seq_length=data.seq_length, vocab_size=vocab_size, seed=config.training.seed,
                part=part, options=options,
            )
            if count
            else None
            for part, count in enumerate(counts)
        ]  # fmt: skip
    prefixes, weights = parse_data_path(data.data_path)
    files = [TokenFile(prefix, vocab_size) for prefix in prefixes]
    cache = IndexCache(data.data_cache_path or _default_cache(config), log)

    def gpt(file: TokenFile, part: int, count: int) -> GPTDataset:
        return GPTDataset(
            file,
            split_bounds(data.split, len(file.data))[part],
            name=PARTS[part],
            num_samples=count,
            seq_length=data.seq_length,
            seed=config.training.seed,
            options=options,
            cache=cache,
        )

    parts: list[SampleSource | None] = []
    for part, count in enumerate(counts):
        sources = [gpt(file, part, count) for file in files] if count else []
        if len(sources) <= 1:
            parts.append(sources[0] if sources else None)
        else:
            shares = whole_shares(weights or [source.samples_per_epoch for source in sources])
            parts.append(BlendedDataset(sources, shares, count))
    return parts


def _default_cache(config: RunConfig) -> str | None:
    folder = config.logging.output_dir
    return None if folder is None else os.path.join(folder, "index-cache")
