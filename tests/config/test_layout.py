"""The arithmetic of layouts: world sizes, padding, neighbours, splits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import ConfigError
from megazero.config.layout import (
    check_world_size,
    near_divisors,
    neighbours,
    padded_vocab_size,
    parse_bytes,
    parse_split,
    smallest_world_size,
)
from tests.config.settings import config_with

SIZE = st.integers(1, 16)


@given(pp=SIZE, cp=SIZE, tp=SIZE, dp=SIZE)
def test_products_are_accepted(pp: int, cp: int, tp: int, dp: int) -> None:
    check_world_size(pp * cp * tp * dp, pp=pp, cp=cp, tp=tp)
    check_world_size(pp * cp * tp * dp, pp=pp, cp=cp, tp=tp, dp=dp)


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (
            6,
            {"tp": 4, "pp": 1, "cp": 1},
            "world size 6 does not fit tp·pp·cp = 4·1·1 = 4: the world size must be a multiple of it. "
            "Start 4 or 8 ranks, or change the parallel sizes.",
        ),
        (
            1,
            {"tp": 2, "pp": 2, "cp": 1},
            "world size 1 does not fit tp·pp·cp = 2·2·1 = 4: the world size must be a multiple of it. "
            "Start 4 ranks, or change the parallel sizes.",
        ),
        (
            4,
            {"tp": 2, "pp": 1, "cp": 1, "dp": 4},
            "world size 4 does not fit tp·pp·cp = 2·1·1 = 2 times dp = 4: the world size must be that product. "
            "Start 8 ranks, or change the parallel sizes.",
        ),
        (
            4,
            {"tp": 0, "pp": 1, "cp": 1},
            "world size 4, tp 0, pp 1, cp 1: each is a whole number >= 1. Correct the smaller ones.",
        ),
    ],
)
def test_other_world_sizes_are_refused(world: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_world_size(world, **sizes)
    assert str(error.value) == message


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_padding_is_the_next_multiple(vocab: int, divisor: int) -> None:
    padded = padded_vocab_size(vocab, divisor)
    assert padded % divisor == 0
    assert vocab <= padded < vocab + divisor


def test_padding_of_gpt2() -> None:
    assert padded_vocab_size(50257, 128) == 50304


@given(st.integers(1, 500), st.integers(1, 500))
def test_neighbours_and_divisors_are_valid_and_near(number: int, other: int) -> None:
    if number % other:
        around = neighbours(number, other)
        assert all(n > 0 and n % other == 0 and abs(n - number) < other for n in around)
        near = near_divisors(number, other)
        assert all(number % n == 0 for n in near)
        assert not [n for n in range(min(near) + 1, max(near)) if number % n == 0]


def test_smallest_world_is_one_replica() -> None:
    assert smallest_world_size(config_with(parallel__tensor_model_parallel_size=4)) == 4
    assert smallest_world_size(config_with(parallel__tensor_model_parallel_size=0)) == 1


@pytest.mark.parametrize(
    ("text", "shares"),
    [("969,30,1", (0.969, 0.03, 0.001)), ("1", (1, 0, 0)), ("3/1", (0.75, 0.25, 0)), (" 8, 1, 1 ", (0.8, 0.1, 0.1))],
)
def test_split(text: str, shares: tuple[float, ...]) -> None:
    assert parse_split(text) == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", "a,b", "1,,1", "1,2,3,4", "-1,2", "0,1,1", "nan,1", "inf,1"])
def test_malformed_split(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_split(text)
    assert str(error.value) == (
        f"--split {text!r} is not a split: give one to three numbers >= 0 for train, validation and test, the first "
        "above 0, such as 969,30,1."
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GiB", 80 * 2**30),
        ("80 GB", 80 * 10**9),
        ("141e9", 141 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512mib", 2**29),
        ("1048576", 2**20),
        ("7B", 7),
    ],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_a_size_that_lacks_its_unit() -> None:
    for text in ("80", "1e3"):
        with pytest.raises(ConfigError) as error:
            parse_bytes(text)
        assert str(error.value) == f"--device-memory {text} is {text} bytes. Write {text}GiB."


@pytest.mark.parametrize("text", ["", "GiB", "80 Gib/s", "80G", "-1GiB", "0", "0.1", "1e999", "nan", "80 GiBytes"])
def test_malformed_bytes(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_bytes(text)
    assert str(error.value) == (
        f"--device-memory {text!r} is not a size: a number, followed by GiB, GB, MiB or another such unit, or by "
        "nothing for bytes. Use 80GiB, for instance."
    )
