"""Several sources as one: which source, and which of its samples, stands at each place of the blend.

Weights are whole shares a_i of a period D = Σ a_i (0.7 and 0.3 are 7 and 3 of 10). Within a period, place n goes to the
source whose next sample has the earliest deadline among those that are due:

    sample k of source i is due from place floor(k·D / a_i) on, and must stand before place ceil((k + 1)·D / a_i)

so after n places each source has n·a_i/D samples, give or take less than one, for every n. The period then repeats: a
place is found by division, whatever the length of the run, and a longer run changes nothing before.
Source: proportionate fairness (Baruah, Cohen, Plaxton, Varvel, Algorithmica 15, 1996): earliest deadline first meets
every deadline.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, isfinite, lcm

import numpy as np
from numpy.typing import NDArray

from megazero.base.errors import ConfigError
from megazero.data.gpt import GPTDataset
from megazero.data.sample import Sample

LARGEST_PERIOD = 1_000_000
"""Weights with no exact period below this are rounded to millionths."""


def parse_data_path(words: Sequence[str]) -> tuple[list[str], list[Fraction] | None]:
    """Prefixes and weights of a --data-path: `prefix`, `w1 p1 w2 p2` or `p1 p2` (weights None: by length).

    As in Megatron, an even number of words of which every odd one is a number means weights.
    Raises ConfigError when it is empty, a prefix looks like a weight's place, or a weight is not above 0.
    """
    if not words:
        raise ConfigError("--data-path is empty: give the prefix of a .bin/.idx pair, or --mock-data.")
    numbers = [_number(word) for word in words]
    if len(words) % 2 or not all(number is not None for number in numbers[::2]):
        if len(words) > 1 and any(number is not None for number in numbers):
            raise ConfigError(
                f"--data-path {' '.join(words)}: some words are numbers, but they do not stand before every prefix. "
                "Give `weight prefix weight prefix …`, or prefixes alone."
            )
        return list(words), None
    weights = [number for number in numbers[::2] if number is not None]
    bad = [f"{word} {prefix}" for word, prefix, w in zip(words[::2], words[1::2], weights, strict=True) if w <= 0]
    if bad:
        raise ConfigError(f"--data-path: weight must be above 0 in {', '.join(bad)}. Leave the source out instead.")
    return list(words[1::2]), weights


def _number(word: str) -> Fraction | None:
    try:
        return Fraction(word) if isfinite(float(word)) else None
    except ValueError:
        return None


def whole_shares(weights: Sequence[Fraction | int], largest: int = LARGEST_PERIOD) -> list[int]:
    """The weights as whole numbers with a small sum: exact if the sum can be at most `largest`, else rounded to it.

    Raises ConfigError for a source whose share is below one in `largest`.
    """
    exact = [Fraction(w) for w in weights]
    scale = lcm(*(w.denominator for w in exact))
    shares = [int(w * scale) for w in exact]
    shares = [a // gcd(*shares) for a in shares]
    total = sum(shares)
    if total <= largest:
        return shares
    rounded = [a * largest // total for a in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (-(shares[i] * largest % total), i))
    for i in by_remainder[: largest - sum(rounded)]:
        rounded[i] += 1
    if 0 in rounded:
        i = rounded.index(0)
        raise ConfigError(
            f"source {i + 1} of the blend has a share of {float(exact[i] / sum(exact)):.1e}; the least is one in "
            f"{largest}. Leave it out or raise its weight."
        )
    return rounded


def blend_period(shares: Sequence[int]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """(source, sample of that source) at each of the D = sum(shares) places of a period."""
    period = sum(shares)
    counts = np.asarray(shares, np.int64)
    sources = np.repeat(np.arange(len(shares)), counts)
    ks = np.arange(period) - np.repeat(np.cumsum(counts) - counts, counts)
    due = ks * period // counts[sources]
    deadline = -(-(ks + 1) * period // counts[sources])
    order = np.argsort(due, kind="stable")
    # One whole number a job, compared by deadline and then by source: the heap stays cheap.
    jobs = (deadline * len(shares) + sources)[order].tolist()
    releases = due[order].tolist()
    chosen = np.empty(period, np.int16)
    heap: list[int] = []
    following = 0
    for place in range(period):
        while following < period and releases[following] <= place:
            heapq.heappush(heap, jobs[following])
            following += 1
        chosen[place] = heapq.heappop(heap) % len(shares)
    samples = np.empty(period, np.int64)
    for i, count in enumerate(shares):
        samples[chosen == i] = np.arange(count)
    return chosen, samples


class BlendedDataset:
    """`num_samples` samples of several sources, mixed by whole shares. The sources keep their own order and epochs."""

    def __init__(self, sources: Sequence[GPTDataset], shares: Sequence[int], num_samples: int) -> None:
        assert len(sources) == len(shares)
        self.sources, self.shares, self.num_samples = tuple(sources), tuple(shares), num_samples
        self._chosen, self._samples = blend_period(shares)

    def __len__(self) -> int:
        return self.num_samples

    def place(self, index: int) -> tuple[int, int]:
        """(source, sample of that source) at a place of the blend."""
        period, rest = divmod(index, len(self._chosen))
        source = int(self._chosen[rest])
        return source, period * self.shares[source] + int(self._samples[rest])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        source, sample = self.place(index)
        return self.sources[source].sample(sample)
