"""Blends: proportions at every prefix, one order for every length, and what --data-path may say."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import ConfigError
from megazero.data.blend import BlendedDataset, blend_period, parse_data_path, whole_shares

shares = st.lists(st.integers(1, 60), min_size=1, max_size=12)


class Numbers:
    """A source whose samples are (its name, their number)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def sample(self, index: int) -> tuple[str, int]:
        return self.name, index


@given(shares)
def test_every_prefix_is_proportionate_within_one_sample(weights):
    chosen, samples = blend_period(weights)
    places = np.arange(1, len(chosen) + 1)
    for i, weight in enumerate(weights):
        taken = np.cumsum(chosen == i)
        assert np.abs(taken - places * weight / sum(weights)).max() < 1
        assert taken[-1] == weight
        assert samples[chosen == i].tolist() == list(range(weight))


@given(weights=shares, few=st.integers(1, 300), more=st.integers(1, 300))
def test_a_longer_blend_changes_nothing_before_and_skips_no_sample(weights, few, more):
    sources = [Numbers(str(i)) for i in range(len(weights))]
    short, long = (BlendedDataset(sources, weights, n) for n in (few, few + more))  # type: ignore[arg-type]
    everything = [long[i] for i in range(len(long))]
    assert [short[i] for i in range(len(short))] == everything[:few]
    for source in sources:
        numbers = [n for name, n in everything if name == source.name]
        assert numbers == list(range(len(numbers)))
    with pytest.raises(IndexError, match=f"sample {few} of {few}"):
        short[few]


def test_many_small_beside_a_large_one():
    """Where merging by virtual time fails: fifty sources of 1 % beside one of 50 %."""
    chosen, _ = blend_period([50] + [1] * 50)
    assert np.abs(np.cumsum(chosen == 0) - np.arange(1, 101) / 2).max() < 1


def test_weights_become_the_smallest_whole_shares():
    assert whole_shares([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert whole_shares([4000, 2000, 2000]) == [2, 1, 1]
    assert whole_shares([Fraction("0.333333"), Fraction("0.666667")]) == [333333, 666667]


@given(st.lists(st.integers(10**7, 10**9), min_size=2, max_size=9))
def test_large_weights_are_rounded_to_the_largest_period(weights):
    rounded = whole_shares(weights, 1000)
    assert sum(rounded) <= 1000
    assert all(abs(a / sum(rounded) - w / sum(weights)) < 1e-3 for a, w in zip(rounded, weights, strict=True))


def test_a_share_too_small():
    with pytest.raises(ConfigError, match=r"source 2 of the blend has a share of 1.0e-07; the least is one in 1000000"):
        whole_shares([Fraction(1), Fraction("1e-7")])


def test_data_path_forms():
    assert parse_data_path(["a"]) == (["a"], None)
    assert parse_data_path(["2024"]) == (["2024"], None)
    assert parse_data_path(["a", "b"]) == (["a", "b"], None)
    assert parse_data_path(["0.7", "a", "3e-1", "b"]) == (["a", "b"], [Fraction("0.7"), Fraction("0.3")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data-path is empty"),
        (["0.7", "a", "b"], "some words are numbers"),
        (["a", "0.3"], "some words are numbers"),
        (["0.7", "a", "0", "b"], "weight must be above 0 in 0 b"),
        (["-1", "a"], "weight must be above 0 in -1 a"),
    ],
)
def test_data_path_that_is_none(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_data_path(words)
