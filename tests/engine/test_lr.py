"""The learning rate's course against values worked out by hand, and what resuming may change of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import CheckpointError, ConfigError
from megazero.config.schema import OptimizerConfig
from megazero.engine.lr import LearningRate, merge


def course(style: str = "cosine", derived: tuple[str, ...] = (), **changes) -> LearningRate:
    """Peak 1.0, minimum 0.1, ten updates of warmup, decay until 110, WSD's over the last 20."""
    settings = {
        "lr": 1.0,
        "min_lr": 0.1,
        "lr_decay_style": style,
        "lr_decay_iters": 110,
        "lr_warmup_iters": 10,
        "lr_wsd_decay_iters": 20,
    }
    return LearningRate.from_config(OptimizerConfig(**{**settings, **changes}), derived)


TABLE = [  # style, changes, n -> learning rate
    ("cosine", {}, {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 60: 0.55, 110: 0.1, 111: 0.1}),
    ("linear", {}, {0: 0.0, 10: 1.0, 35: 0.775, 60: 0.55, 85: 0.325, 110: 0.1, 500: 0.1}),
    ("constant", {}, {0: 0.0, 1: 0.1, 10: 1.0, 110: 1.0, 999: 1.0}),
    ("inverse-square-root", {}, {5: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3, 110: math.sqrt(10 / 110), 111: 0.1}),
    ("inverse-square-root", {"min_lr": 0.4}, {40: 0.5, 90: 0.4, 111: 0.4}),
    ("inverse-square-root", {"lr_warmup_iters": 0}, {0: 1.0, 1: 1.0, 4: 0.5, 100: 0.1}),
    ("WSD", {"lr_wsd_decay_style": "linear"}, {5: 0.5, 10: 1.0, 90: 1.0, 95: 0.775, 100: 0.55, 110: 0.1, 111: 0.1}),
    (
        "WSD",
        {"lr_wsd_decay_style": "cosine"},
        {90: 1.0, 100: 0.55, 105: 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2, 110: 0.1},
    ),
    ("WSD", {"lr_wsd_decay_style": "exponential"}, {90: 1.0, 100: 0.1 + 0.9 * (math.sqrt(2) - 1), 110: 0.1}),
    ("WSD", {"lr_wsd_decay_style": "minus_sqrt"}, {90: 1.0, 95: 0.55, 100: 0.1 + 0.9 * (1 - math.sqrt(0.5)), 110: 0.1}),
    ("cosine", {"lr_warmup_init": 0.2}, {0: 0.2, 5: 0.6, 10: 1.0}),
    (
        "linear",
        {"lr_warmup_style": "log", "lr_warmup_init": 0.5},
        {0: 0.5, 1: 0.5, 5: 0.5 + 0.5 * math.log(5, 10), 10: 1.0, 60: 0.55},
    ),
    ("constant", {"lr_warmup_style": "log", "lr_warmup_iters": 1}, {0: 0.0, 1: 0.0, 2: 1.0}),
    ("linear", {"lr_warmup_iters": 0}, {0: 1.0, 55: 0.55, 110: 0.1}),
    ("linear", {"lr_warmup_fraction": 0.05}, {0: 0.0, 5: 5 / 5.5, 6: 0.1 + 0.9 * (1 - 0.5 / 104.5)}),
]


@pytest.mark.parametrize(("style", "changes", "values"), TABLE)
def test_courses_by_hand(style, changes, values):
    rate = course(style, **changes)
    assert {n: rate.at(n) for n in values} == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize(
    ("style", "changes", "message"),
    [
        ("cosine", {"lr_warmup_iters": 110}, "a warmup of 110 iterations with lr-decay-iters 110.*--lr-warmup-iters"),
        ("linear", {"lr_warmup_fraction": 1.0}, "the warmup must end before the decay"),
        ("WSD", {"lr_wsd_decay_iters": 101}, "lr-wsd-decay-iters 101 .*from 1 to 100"),
        ("WSD", {"lr_wsd_decay_iters": None}, "lr-wsd-decay-iters 0 "),
        ("linear", {"min_lr": 2.0}, "min_lr 2 with lr 1: .* Change --min-lr"),
        ("linear", {"lr_warmup_init": -1.0}, "lr_warmup_init -1 with lr 1"),
    ],
)
def test_impossible_courses(style, changes, message):
    with pytest.raises(ConfigError, match=message):
        course(style, **changes)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        course(lr_warmup_iters=200, min_lr=2.0, lr_warmup_init=3.0)
    assert len(caught.value.problems) == 3


def test_the_state_survives_json():
    rate = course("WSD", derived=("lr_decay_iters",), lr_warmup_fraction=0.03)
    back = LearningRate.from_state(json.loads(json.dumps(rate.state())))
    older = {name: value for name, value in rate.state().items() if name != "lr_warmup_style"}
    assert LearningRate.from_state(older) == rate
    assert back == rate
    assert "derived" not in rate.state()
    with pytest.raises(CheckpointError, match=r"another version wrote it.*--finetune"):
        LearningRate.from_state({**rate.state(), "phase": 3})


# --- resuming -----------------------------------------------------------------------------------------------------

LENGTHS = ("lr_decay_iters", "lr_wsd_decay_iters")
"""What the command leaves to --train-iters unless it states it."""


def resume(current: LearningRate, stored: LearningRate, updates: int, train_iters: int = 110, override: bool = False):
    return merge(current, stored, updates=updates, train_iters=train_iters, override=override)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_the_same_command_resumes_its_course(style):
    assert resume(course(style), course(style), updates=70) == (course(style), None)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_finished_decay_stays_finished_and_says_how_to_stretch(style):
    longer = course(style, derived=LENGTHS, lr_decay_iters=220)
    rate, warning = resume(longer, course(style), updates=110, train_iters=220)
    assert rate == course(style)
    assert rate.at(110) == rate.at(219) == 0.1
    assert warning is not None
    assert "decay ends at iteration 110; iterations 111 to 220 run at 0.1 (min-lr)" in warning
    assert "To stretch the course over 220 iterations, with a jump now: --override-opt-param-scheduler" in warning


def test_an_unfinished_decay_is_kept_too():
    rate, warning = resume(course(derived=LENGTHS, lr_decay_iters=220), course(), updates=60, train_iters=220)
    assert rate == course()
    assert "iterations 111 to 220 run at 0.1" in (warning or "")


def test_a_run_cut_short_hears_that_its_decay_does_not_end():
    rate, warning = resume(course("linear", derived=LENGTHS, lr_decay_iters=80), course("linear"), 60, train_iters=80)
    assert rate == course("linear")
    assert "ends at iteration 80, before the checkpoint's learning-rate decay does at 110" in (warning or "")
    assert "its last learning rate is 0.379, not 0.1" in (warning or "")  # 0.1 + 0.9 (1 - 69/100)


def test_the_flag_takes_the_commands_course():
    longer = course(lr_decay_iters=220, lr=2.0)
    assert resume(longer, course(), updates=110, train_iters=220, override=True) == (longer, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lr": 2.0},
            "--lr 2, but the checkpoint's run has --lr 1, and .* 60 updates. Give --lr 1, or take .*--override",
        ),
        ({"min_lr": 0.2}, "--min-lr 0.2, but the checkpoint's run has --min-lr 0.1"),
        ({"lr_decay_iters": 220}, "--lr-decay-iters 220, but the checkpoint's run has --lr-decay-iters 110"),
        ({"lr_decay_style": "linear"}, "--lr-decay-style linear, .* Give --lr-decay-style cosine"),
        ({"lr_warmup_iters": 5}, "--lr-warmup-iters 5, .* Give --lr-warmup-iters 10"),
        ({"lr_warmup_fraction": 0.3}, "--lr-warmup-fraction 0.3, .* Give --lr-warmup-iters 10"),
        ({"lr_warmup_init": 0.5}, "--lr-warmup-init 0.5"),
    ],
)
def test_stating_another_course_in_the_middle_is_an_error(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resume(course(**change), course(), updates=60)
    assert len(caught.value.problems) == 1


def test_a_changed_fraction_is_named_as_the_fraction():
    with pytest.raises(ConfigError, match=r"--lr-warmup-fraction 0.2, .* Give --lr-warmup-fraction 0.1,"):
        resume(course(lr_warmup_fraction=0.2), course(lr_warmup_fraction=0.1), updates=60)


@pytest.mark.parametrize("derived", [LENGTHS, ()], ids=["derived", "stated"])
@pytest.mark.parametrize("updates", [0, 40, 90])
def test_wsd_is_lengthened_freely_before_its_decay(updates, derived):
    longer = course("WSD", derived=derived, lr_decay_iters=220, lr_wsd_decay_iters=40)
    rate, warning = resume(longer, course("WSD"), updates=updates, train_iters=220)
    assert warning is None
    assert [rate.at(n) for n in (90, 110, 180, 220)] == pytest.approx([1.0, 1.0, 1.0, 0.1])
    assert rate.at(200) < 1.0


def test_wsd_keeps_the_warmup_it_began_with_when_lengthened():
    longer = course("WSD", derived=LENGTHS, lr_decay_iters=220, lr_wsd_decay_iters=40, lr_warmup_fraction=0.1)
    stored = course("WSD", lr_warmup_fraction=0.1)
    rate, warning = resume(longer, stored, updates=90, train_iters=220)
    assert warning is None
    assert rate.lr_warmup_iters == 11
    assert rate.lr_decay_iters == 220


@pytest.mark.parametrize("updates", [95, 110])
def test_wsd_within_or_after_its_decay_points_at_an_earlier_checkpoint(updates):
    longer = course("WSD", derived=LENGTHS, lr_decay_iters=220, lr_wsd_decay_iters=40)
    rate, warning = resume(longer, course("WSD"), updates=updates, train_iters=220)
    assert rate == course("WSD")
    assert warning is not None
    assert "resume from a checkpoint before it began: --ckpt-step 90 or less" in warning
    assert "--override-opt-param-scheduler" in warning


def test_a_branch_off_a_stable_wsd_checkpoint_decays_early():
    early = course("WSD", derived=LENGTHS, lr_decay_iters=60, lr_wsd_decay_iters=10)
    rate, warning = resume(early, course("WSD"), updates=50, train_iters=60)
    assert (rate, warning) == (early, None)
    assert rate.at(50) == 1.0
    assert rate.at(60) == pytest.approx(0.1)


def test_a_course_is_free_to_change_until_it_has_been_used():
    longer = course(derived=LENGTHS, lr_decay_iters=220, lr_wsd_decay_iters=40)
    assert resume(longer, course(), updates=11, train_iters=220) == (longer, None)  # still in the warmup: at(0..10)
    assert resume(longer, course(), updates=12, train_iters=220)[0] == course()


@pytest.mark.parametrize("style", ["constant", "inverse-square-root"])
def test_courses_without_an_end_are_lengthened_freely(style):
    longer = course(style, derived=LENGTHS, lr_decay_iters=220)
    assert resume(longer, course(style), updates=110, train_iters=220) == (longer, None)


@given(
    style=st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]),
    shape=st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
    warmup=st.integers(0, 40),
    decay=st.integers(50, 200),
    longer=st.integers(50, 400),
    updates=st.integers(0, 220),
)
def test_resuming_never_rewrites_what_was_used(style, shape, warmup, decay, longer, updates):
    stored = course(style, lr_wsd_decay_style=shape, lr_warmup_iters=warmup, lr_decay_iters=decay, lr_wsd_decay_iters=5)
    asked = replace(stored, lr_decay_iters=longer, lr_wsd_decay_iters=7 * (style == "WSD"), derived=frozenset(LENGTHS))
    rate, _ = resume(asked, stored, updates, train_iters=longer)
    assert [rate.at(n) for n in range(updates)] == [stored.at(n) for n in range(updates)]
    assert all(0 <= rate.at(n) <= rate.lr for n in range(max(decay, longer) + 2))


@given(st.sampled_from(["linear", "cosine", "inverse-square-root", "WSD"]), st.integers(10, 200))
def test_after_the_warmup_it_never_rises(style, n):
    assert course(style).at(n + 1) <= course(style).at(n) + 1e-15
