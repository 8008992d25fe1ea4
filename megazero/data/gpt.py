"""Packed samples from a token file: documents are concatenated in a random order and cut into windows.

    epoch e:   documents in an order that depends on (seed, e) only
               | d7 | d2 |   d9   |…      T tokens
               [  sample 0  ][  sample 1  ]…   windows of S + 1 tokens that share one: n = (T - 1) // S samples
               which are then taken in an order that depends on (seed, e) only

Sample i is sample i % n of epoch i // n, so it never depends on how many samples are asked for. Sources: the packing of
megatron/core/datasets/gpt_dataset.py (whose order changes when a run is made longer, and here does not).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megazero.base.errors import ConfigError, DataError
from megazero.data.index_cache import Arrays, IndexCache
from megazero.data.indexed import IndexedDataset, bin_path, idx_path
from megazero.data.sample import Sample, SampleOptions, make_sample

_BLOCK = 1 << 16
_BLOCKS = 256
"""The fingerprint reads this many blocks of this many bytes of a .bin file, evenly spread: all of it up to 16 MiB."""
_DOCUMENTS, _SAMPLES = 0, 1


class TokenFile:
    """An opened .bin/.idx pair that was checked against a vocabulary. One is shared by the splits of a prefix."""

    def __init__(self, prefix: str, vocab_size: int) -> None:
        """Raises DataError when the pair is damaged or empty, holds no integers, or ids outside the vocabulary."""
        self.data = IndexedDataset(prefix)
        self.vocab_size = vocab_size
        if self.data.dtype.kind not in "iu":
            raise DataError(f"{bin_path(prefix)} holds {self.data.dtype} numbers; token ids are integers.")
        if self.data.num_tokens == 0:
            raise DataError(
                f"{bin_path(prefix)} is empty: there are no tokens to train on. Check what it was made from."
            )
        self.fingerprint = self._read_fingerprint()

    def read(self, spans: Sequence[tuple[int, int, int]]) -> NDArray:
        """Tokens of (sequence, first token, count) spans, joined. All that a model sees is read and checked here."""
        tokens = np.concatenate([self.data.get(*span) for span in spans])
        self._check_ids(tokens, f"in sequences {', '.join(str(span[0]) for span in spans[:8])}")
        return tokens

    def _read_fingerprint(self) -> str:
        """A hash of the whole .idx, the .bin's size and blocks of it; the ids in the blocks are checked on the way."""
        digest = hashlib.blake2b(digest_size=16)
        with idx_path(self.data.prefix).open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        size = bin_path(self.data.prefix).stat().st_size
        digest.update(str(size).encode())
        starts = sorted({int(start) for start in np.linspace(0, max(size - _BLOCK, 0), _BLOCKS) // 8 * 8} | {0})
        if size <= _BLOCK * _BLOCKS:
            starts = list(range(0, size, _BLOCK))
        with bin_path(self.data.prefix).open("rb") as file:
            for start in starts:
                file.seek(start)
                block = file.read(_BLOCK)
                digest.update(block)
                self._check_ids(np.frombuffer(block, self.data.dtype), f"at byte {start} or after")
        return digest.hexdigest()

    def _check_ids(self, tokens: NDArray, where: str) -> None:
        if len(tokens) == 0:
            return
        largest, smallest = int(tokens.max()), int(tokens.min())
        if largest >= self.vocab_size or smallest < 0:
            bad = largest if largest >= self.vocab_size else smallest
            raise DataError(
                f"{bin_path(self.data.prefix)} has token id {bad} ({where}), outside the vocabulary of "
                f"{self.vocab_size} ids (0 to {self.vocab_size - 1}). It was made with another tokenizer: tokenize the "
                "text again with this run's --tokenizer-model, or set --vocab-size."
            )


def split_bounds(split: str, count: int) -> list[tuple[int, int]]:
    """[begin, end) of train, validation and test among `count` sequences, for relative sizes as "969,30,1".

    Rounded as Megatron rounds: each cumulative share times count, to the nearest whole.
    Raises ConfigError unless there are one to three numbers >= 0, not all zero.
    """
    try:
        shares = [float(word) for word in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise ConfigError(
            f"--split {split!r}: give relative sizes of train, validation and test, numbers >= 0 with one above 0, "
            "e.g. 969,30,1."
        )
    shares += [0.0] * (3 - len(shares))
    total = sum(shares)
    edges = [round(sum(shares[:i]) / total * count) for i in range(4)]
    return list(pairwise(edges))


class GPTDataset:
    """`num_samples` samples from sequences [begin, end) of a token file; as many epochs as it takes."""

    def __init__(
        self,
        file: TokenFile,
        bounds: tuple[int, int],
        *,
        name: str,
        num_samples: int,
        seq_length: int,
        seed: int,
        options: SampleOptions,
        cache: IndexCache,
    ) -> None:
        """`name` ("train") is for messages. Raises DataError when the range holds fewer than seq_length + 1 tokens."""
        self.file, self.bounds, self.num_samples = file, bounds, num_samples
        self.seq_length, self.seed, self.options, self.cache = seq_length, seed, options, cache
        tokens = int(file.data.lengths[slice(*bounds)].sum(dtype=np.int64))
        self.samples_per_epoch = max(tokens - 1, 0) // seq_length
        """n of the drawing above."""
        if self.samples_per_epoch == 0:
            raise DataError(
                f"the {name} part of {file.data.prefix} is shorter than one sequence: it has {tokens} tokens in "
                f"{bounds[1] - bounds[0]} of {len(file.data)} documents, one sample needs seq-length + 1 = "
                f"{seq_length + 1}. Lower --seq-length, change --split, or give more text."
            )
        self._epochs: dict[int, Arrays] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return self.sample(index)

    def sample(self, index: int) -> Sample:
        """Sample `index` of the endless order, which `num_samples` merely ends."""
        epoch, place = divmod(index, self.samples_per_epoch)
        arrays = self._epoch(epoch)
        documents = arrays["documents"]
        position, offset = (int(x) for x in arrays["starts"][place])
        spans: list[tuple[int, int, int]] = []
        begins: list[int] = []
        missing = self.seq_length + 1
        while missing:
            sequence = int(documents[position])
            length = min(int(self.file.data.lengths[sequence]) - offset, missing)
            if length and offset == 0:
                begins.append(self.seq_length + 1 - missing)
            spans.append((sequence, offset, length))
            missing -= length
            position, offset = position + 1, 0
        return make_sample(self.file.read(spans), np.asarray(begins, np.int64), self.options)

    def _epoch(self, epoch: int) -> Arrays:
        """The epoch's index; the last two used stay open (a blend and the end of an epoch need no more)."""
        if epoch not in self._epochs:
            key = {
                "version": 1,
                "file": self.file.fingerprint,
                "seed": self.seed,
                "epoch": epoch,
                "seq_length": self.seq_length,
                "sequences": list(self.bounds),
            }
            arrays = self.cache.get(key, lambda: self._build(epoch))
            for old in sorted(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[epoch] = arrays
        return self._epochs[epoch]

    def _build(self, epoch: int) -> Arrays:
        self.file.data.check_index()
        lengths = self.file.data.lengths[slice(*self.bounds)]
        return build_epoch(lengths, self.bounds[0], self.seq_length, self.seed, epoch)


def build_epoch(lengths: NDArray, first: int, seq_length: int, seed: int, epoch: int) -> Arrays:
    """One epoch's index.

    documents int64 [len(lengths)]: sequence numbers (from `first`) in the epoch's order.
    starts int64 [n, 2]: where each sample begins (place in `documents`, token there), in the order they are taken.
    """
    order = permutation(len(lengths), seed, epoch, _DOCUMENTS)
    ends = np.cumsum(lengths[order], dtype=np.int64)
    count = max(int(ends[-1]) - 1, 0) // seq_length if len(ends) else 0
    tokens = np.arange(count, dtype=np.int64) * seq_length
    places = np.searchsorted(ends, tokens, side="right")
    before = np.concatenate([np.zeros(1, np.int64), ends])[places]
    starts = np.stack([places, tokens - before], axis=1)
    return {"documents": order + first, "starts": starts[permutation(count, seed, epoch, _SAMPLES)]}


def permutation(count: int, seed: int, epoch: int, use: int) -> NDArray[np.int64]:
    """An order of `count` things that depends on (seed, epoch, use) only.

    The stable sort of raw PCG64 draws: numpy promises those bits for ever, but not `Generator.permutation`.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, use]))
    return np.argsort(bits.random_raw(count), kind="stable")
