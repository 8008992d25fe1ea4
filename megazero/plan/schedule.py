"""A pipeline schedule as data: what each rank does in which order, its timeline for given times, and a drawing.

table  = for each rank its actions in order: F forward, B backward, or its halves I (by input) and W (by weight)
replay = each action starts when the rank is free and what it needs is there
bubble = time idle ÷ time busy, over all ranks

    1F1B, 2 ranks, 3 micro-batches      rank 0 │ 12..1̲1̲32̲2̲.3̲3̲      bubble (p - 1)/m = 1/3
                                        rank 1 │ .11̲1̲22̲2̲33̲3̲..
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One forward or backward (half) of one micro-batch through one stage."""

    stage: int
    kind: Kind
    micro_batch: int


Table = Sequence[Sequence[Action]]
"""The actions of each pp rank, in order."""

UNIT_TIMES: Mapping[str, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""A backward costs twice a forward, half of it for the input's gradient."""


class Event(NamedTuple):
    """An action with its time, in the unit of the times given."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each rank does what."""

    ranks: tuple[tuple[Event, ...], ...]

    @property
    def end(self) -> float:
        """When the last rank is done."""
        return max((event.end for events in self.ranks for event in events), default=0.0)

    @property
    def bubble(self) -> float:
        """Time idle ÷ time busy, over all ranks: the (p - 1)/m of the papers, for stages of equal times."""
        busy = sum(event.end - event.start for events in self.ranks for event in events)
        return (self.end * len(self.ranks) - busy) / busy if busy else 0.0


def replay(table: Table, times: Mapping[str, float] | Mapping[Action, float], transfer: float = 0.0) -> Timeline:
    """The timeline of a step: every action starts as early as the order on its rank and the data allow.

    Args:
        times: duration of each kind of action, or of each action (measured ones).
        transfer: time that a tensor takes from one rank to another.

    Raises ValueError when the order can never finish: an action waits for one that comes later.
    """
    last = max((action.stage for actions in table for action in actions), default=0)
    ends: dict[Action, tuple[float, int]] = {}  # when and on which rank
    events: list[list[Event]] = [[] for _ in table]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(table):
            for action in itertools.islice(actions, len(events[rank]), None):
                found = [ends.get(need) for need in _needs(action, last)]
                if None in found:
                    break
                ready = [end + transfer * (place != rank) for end, place in filter(None, found)]
                start = max([events[rank][-1].end if events[rank] else 0.0, *ready])
                event = Event(action, start, start + _time_of(action, times))
                events[rank].append(event)
                ends[action._replace(kind="I") if action.kind == "B" else action] = (event.end, rank)
                moved = True
    stuck = [str(row[len(done)]) for row, done in zip(table, events, strict=True) if len(done) < len(row)]
    if stuck:
        raise ValueError(
            f"the schedule never finishes: {len(stuck)} ranks wait for what comes later, at {', '.join(stuck)}"
        )
    return Timeline(tuple(tuple(row) for row in events))


def _needs(action: Action, last: int) -> list[Action]:
    """What must be done before; a whole backward counts as the half that others wait for."""
    stage, kind, batch = action
    if kind == "F":
        return [Action(stage - 1, "F", batch)] if stage else []
    if kind == "W":
        return [Action(stage, "I", batch)]
    return [Action(stage, "F", batch), *([Action(stage + 1, "I", batch)] if stage < last else [])]


def _time_of(action: Action, times: Mapping[str, float] | Mapping[Action, float]) -> float:
    exact: float | None = times.get(action)  # type: ignore[call-overload]
    return times[action.kind] if exact is None else exact  # type: ignore[index]


def most_alive(actions: Sequence[Action], weight: Mapping[int, float]) -> float:
    """The largest sum of `weight[stage]` over the (stage, micro-batch) pairs of one rank that are between forward and
    the end of backward: with bytes of activations as weights, their peak.

    Between the halves of a backward everything counts as alive, a little more than is.
    """
    alive = most = 0.0
    for action in actions:
        alive += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind] * weight[action.stage]
        most = max(most, alive)
    return most


def bubble_formula(schedule: str, stages: int, micro_batches: int, virtual: int = 1) -> float:
    """Idle ÷ busy time of a step, for equal stages, a backward that costs two forwards and its halves one each.

        gpipe, 1f1b       (p - 1)/m            Huang et al., arXiv 1811.06965; Narayanan et al., 2104.04473
        interleaved-1f1b  (p - 1)/(v m)        Narayanan et al.
        interleaved-zero-bubble, zbv, dualpipev   (p - 1)/(3 v m): of F + I + W only a third is waited for
                                               Qi et al., 2401.10241 (ZB1P, ZB-V); DeepSeek-V3, 2412.19437

    Holds once the pipeline is full: m ≥ p, for zbv m ≥ 2p - 1. ZB-V's own paper counts 0, as it lets each rank begin
    the next step when it is done with this one; here all ranks wait for the gradient norm, so the V's slant counts.

    Args:
        stages: p, the pp ranks. virtual: v, stages on each.
    """
    divisor = {"gpipe": 1, "1f1b": 1, "interleaved-1f1b": virtual}.get(schedule, 3 * virtual)
    return (stages - 1) / (divisor * micro_batches)


def draw(timeline: Timeline, width: int = 120) -> str:
    """The timeline as text, one line a rank, a column for the time of the shortest action: micro-batches count from 1,
    their last digits stand for forwards, underlined for backwards, overlined for a backward's weight half, and dots
    are idle. What is wider than `width` is cut in the middle.
    """
    shortest = min((event.end - event.start for row in timeline.ranks for event in row), default=1.0) or 1.0
    columns = max(round(timeline.end / shortest), 1)
    label = len(f"rank {len(timeline.ranks) - 1} ")
    room = max(width - label - 2, 16)
    lines = []
    for rank, row in enumerate(timeline.ranks):
        cells = ["."] * columns
        for event in row:
            cell = (
                str((event.action.micro_batch + 1) % 10)
                + {"F": "", "B": "\u0332", "I": "\u0332", "W": "\u0305"}[event.action.kind]
            )
            for column in range(
                round(event.start / shortest), max(round(event.end / shortest), round(event.start / shortest) + 1)
            ):
                if column < columns:
                    cells[column] = cell
        if columns > room:
            half = (room - 3) // 2
            cells = [*cells[:half], " … ", *cells[-half:]]
        lines.append(f"{f'rank {rank}':<{label}}│ {''.join(cells)}")
    return "\n".join(lines)
