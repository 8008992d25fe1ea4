"""The batch's three numbers: each from the others, and errors that name what would work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import ConfigError
from megazero.config.batch import complete_batch
from megazero.config.derive import derive
from megazero.config.rules import find_problems
from megazero.config.validate import resolve
from tests.config.settings import config_with

NUMBER = st.integers(1, 60)


@given(NUMBER, NUMBER, st.integers(1, 16))
def test_any_two_give_the_third(micro: int, accumulation: int, ranks: int) -> None:
    step = micro * accumulation * ranks
    whole = (step, micro, accumulation)
    assert complete_batch(None, micro, accumulation, ranks) == whole
    assert complete_batch(step, None, accumulation, ranks) == whole
    assert complete_batch(step, micro, None, ranks) == whole
    assert complete_batch(step, micro, accumulation, ranks) == whole


def test_one_or_none_is_enough() -> None:
    assert complete_batch(32, None, None, 4) == (32, 8, 1)
    assert complete_batch(None, 3, None, 4) == (12, 3, 1)
    assert complete_batch(None, None, 5, 4) == (20, 1, 5)
    assert complete_batch(None, None, None, 4) == (4, 1, 1)


@given(st.one_of(st.none(), NUMBER), st.one_of(st.none(), NUMBER), st.one_of(st.none(), NUMBER), st.integers(1, 16))
def test_a_number_is_never_rounded_to_fit(
    step: int | None, micro: int | None, accumulation: int | None, ranks: int
) -> None:
    try:
        batch = complete_batch(step, micro, accumulation, ranks)
    except ConfigError:
        batch = None
    if batch is not None:
        assert batch.step == batch.micro * batch.accumulation * ranks > 0
        assert step in (None, batch.step)
        assert micro in (None, batch.micro)
        assert accumulation in (None, batch.accumulation)


@pytest.mark.parametrize(
    ("numbers", "ranks", "message"),
    [
        (
            (24, None, 4),
            4,
            "--global-batch-size 24 with --gradient-accumulation-steps 4 on 4 data-parallel ranks makes 24 / (4 · 4) = "
            "1.5 samples in a micro-batch, which must be a whole number above 0. Use 3 data-parallel ranks, or "
            "--global-batch-size 16 or 32, or --gradient-accumulation-steps 3 or 6.",
        ),
        (
            (10, 4, None),
            2,
            "--global-batch-size 10 with --micro-batch-size 4 on 2 data-parallel ranks makes 10 / (4 · 2) = 1.25 "
            "micro-batches, which must be a whole number above 0. Use --global-batch-size 8 or 16, or "
            "--micro-batch-size 1 or 5.",
        ),
        (
            (3, None, None),
            2,
            "--global-batch-size 3 on 2 data-parallel ranks makes 3 / 2 = 1.5 samples in a micro-batch, which must be "
            "a whole number above 0. Use 1 data-parallel rank, or --global-batch-size 2 or 4.",
        ),
        (
            (7, 2, 3),
            1,
            "--global-batch-size 7 is not --micro-batch-size · --gradient-accumulation-steps · data-parallel ranks = "
            "2 · 3 · 1 = 6. Use --global-batch-size 6.",
        ),
    ],
)
def test_what_does_not_fit_names_what_would(
    numbers: tuple[int | None, int | None, int | None], ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        complete_batch(*numbers, ranks)
    assert str(error.value) == message


def test_a_run_takes_the_accumulation_into_its_batch() -> None:
    filled = resolve(config_with(training__gradient_accumulation_steps=3, training__micro_batch_size=2), 2)
    assert filled.training.global_batch_size == 12
    filled = resolve(config_with(training__gradient_accumulation_steps=3, training__global_batch_size=12), 2)
    assert filled.training.micro_batch_size == 2
    assert filled.origins["training.micro_batch_size"].startswith("derived: global-batch-size / (gradient-accum")
    assert resolve(filled, 2) == filled


def test_a_run_whose_three_numbers_do_not_fit_is_refused_once() -> None:
    config = config_with(
        training__gradient_accumulation_steps=3, training__global_batch_size=10, training__micro_batch_size=2
    )
    assert find_problems(derive(config, 1), 1) == [
        "--global-batch-size 10 is not --micro-batch-size · --gradient-accumulation-steps · data-parallel ranks = "
        "2 · 3 · 1 = 6. Use --global-batch-size 6, or --gradient-accumulation-steps 5."
    ]
    config = config_with(training__gradient_accumulation_steps=4, training__global_batch_size=16)
    (problem,) = find_problems(derive(config, 8), 8)
    assert "Use at most 4 data-parallel ranks" in problem
    assert find_problems(derive(config, None), None) == []
