"""Schedules as data: torch's tables replayed against the papers' bubbles, measured times, deadlocks, the drawing."""

from __future__ import annotations

import pytest

from megazero.parallel.schedule_table import schedule_table
from megazero.plan.schedule import UNIT_TIMES, Action, bubble_formula, draw, most_alive, replay

SCHEDULES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved-1f1b", 2),
    ("interleaved-1f1b", 3),
    ("interleaved-zero-bubble", 1),
    ("interleaved-zero-bubble", 2),
    ("zbv", 2),
    ("dualpipev", 2),
]


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
@pytest.mark.parametrize(("pp", "batches"), [(2, 4), (2, 8), (4, 8), (4, 16), (8, 16)])
def test_bubble_of_torchs_own_order_is_the_formula(schedule: str, virtual: int, pp: int, batches: int) -> None:
    timeline = replay(schedule_table(schedule, pp, virtual, batches), UNIT_TIMES)
    assert timeline.bubble == pytest.approx(bubble_formula(schedule, pp, batches, virtual))


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_every_micro_batch_goes_once_through_every_stage(schedule: str, virtual: int) -> None:
    table = schedule_table(schedule, 4, virtual, 8)
    actions = [action for row in table for action in row]
    assert len(set(actions)) == len(actions)
    every = {(stage, batch) for stage in range(4 * virtual) for batch in range(8)}
    assert {(a.stage, a.micro_batch) for a in actions if a.kind == "F"} == every
    assert {(a.stage, a.micro_batch) for a in actions if a.kind in "BI"} == every
    assert {(a.stage, a.micro_batch) for a in actions if a.kind in "BW"} == every


def test_no_order_of_torchs_waits_for_itself() -> None:
    """Whatever torch accepts, with fewer micro-batches than ranks too, runs to its end."""
    for schedule, virtual in SCHEDULES:
        for pp in (2, 3, 4):
            for batches in range(1, 10):
                try:
                    table = schedule_table(schedule, pp, virtual, batches)
                except ValueError:  # torch's rule, which config/pipeline_rules.py knows
                    continue
                assert replay(table, UNIT_TIMES).end > 0


def test_replay_takes_measured_times_and_transfers() -> None:
    table = schedule_table("1f1b", 2, 1, 2)
    times = {action: 1.0 for row in table for action in row} | {Action(1, "F", 0): 5.0}
    timeline = replay(table, times)
    assert [(event.action, event.start, event.end) for event in timeline.ranks[1]] == [
        (Action(1, "F", 0), 1.0, 6.0),
        (Action(1, "B", 0), 6.0, 7.0),
        (Action(1, "F", 1), 7.0, 8.0),
        (Action(1, "B", 1), 8.0, 9.0),
    ]
    assert [event.start for event in timeline.ranks[0]] == [0.0, 1.0, 7.0, 9.0]
    assert timeline.end == 10.0
    assert timeline.bubble == pytest.approx((20 - 12) / 12)
    assert replay(table, times, transfer=0.5).end == 11.0


def test_an_order_that_waits_for_itself_is_named() -> None:
    table = [[Action(0, "B", 0), Action(0, "F", 0)], [Action(1, "F", 0), Action(1, "B", 0)]]
    with pytest.raises(ValueError, match="the schedule never finishes: 2 ranks wait for what comes later"):
        replay(table, UNIT_TIMES)


@pytest.mark.parametrize(
    ("schedule", "virtual", "alive"),
    [("gpipe", 1, [8, 8, 8, 8]), ("1f1b", 1, [4, 3, 2, 1]), ("interleaved-1f1b", 2, [11, 9, 7, 5])],
)
def test_micro_batches_in_flight(schedule: str, virtual: int, alive: list[int]) -> None:
    """1F1B holds p - r of them, interleaved 2(p - r - 1) + (v - 1)p + 1 (Megatron's warm-up and one more)."""
    table = schedule_table(schedule, 4, virtual, 8)
    assert [most_alive(row, dict.fromkeys(range(8), 1.0)) for row in table] == alive


def test_the_drawing() -> None:
    timeline = replay(schedule_table("1f1b", 2, 1, 3), UNIT_TIMES)
    under = "\u0332"
    assert draw(timeline).replace(under, "_").splitlines() == [
        "rank 0 │ 12..1_1_32_2_.3_3_",
        "rank 1 │ .11_1_22_2_33_3_..",
    ]
    zero = draw(replay(schedule_table("interleaved-zero-bubble", 2, 1, 2), UNIT_TIMES))
    assert zero.replace(under, "_").replace("\u0305", "'").splitlines() == [
        "rank 0 │ 12.1_1'2_2'",
        "rank 1 │ .11_22_1'2'",
    ]


def test_a_wide_drawing_is_cut_in_the_middle() -> None:
    timeline = replay(schedule_table("1f1b", 2, 1, 100), UNIT_TIMES)
    for line in draw(timeline, width=60).splitlines():
        assert " … " in line
        assert len(line.replace("\u0332", "")) <= 60
