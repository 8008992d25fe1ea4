"""Layouts to try: each axis alone, each pair of axes, and as many drawn at random as asked for.

A case takes one label of each axis below, the first of which is the plain one. A new axis or value is one line here;
whether a combination is possible is the configuration's own rules' to say.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from megazero.base.errors import ConfigError
from tests.parity.measure import Layout, configure

SEED = 20_240_611
Changes = dict[str, Any]
"""Fields of Layout, or settings by recipe key, and what tests.parity.measure.train takes with them."""

AXES: dict[str, dict[str, Changes]] = {
    "tp": {"": {}, "tp2": {"tp": 2}, "tp4": {"tp": 4}, "tp8": {"tp": 8}},
    "dp": {"": {}, "dp2": {"dp": 2}, "dp4": {"dp": 4}, "dp8": {"dp": 8}},
    "pp": {
        "": {},
        "pp2 1f1b": {"pp": 2, "schedule": "1f1b"},
        "pp2 gpipe": {"pp": 2, "schedule": "gpipe"},
        "pp2 interleaved": {"pp": 2, "schedule": "interleaved-1f1b", "virtual": 2},
        "pp2 zero-bubble": {"pp": 2, "schedule": "interleaved-zero-bubble", "virtual": 2},
        "pp2 zbv": {"pp": 2, "schedule": "zbv"},
        "pp2 dualpipev": {"pp": 2, "schedule": "dualpipev"},
        "pp4 1f1b": {"pp": 4, "schedule": "1f1b"},
    },
    "cp": {
        "": {},
        "cp2 p2p": {"cp": 2, "cp_comm": "p2p"},
        "cp2 a2a": {"cp": 2, "cp_comm": "a2a"},
        "cp4 p2p": {"cp": 4, "cp_comm": "p2p"},
        "cp4 a2a": {"cp": 4, "cp_comm": "a2a"},
    },
    "zero": {"": {}, "zero0": {"zero": 0}, "zero2": {"zero": 2}, "zero3": {"zero": 3}},
    "sequence": {"": {}, "sequence": {"sequence": True}},
    "micro-batch": {"": {}, "micro-batch1": {"micro_batch": 1}, "micro-batch4": {"micro_batch": 4}},
    "recompute": {
        "": {},
        "recompute-full": {"recompute.recompute_granularity": "full"},
        "recompute-selective": {"recompute.recompute_granularity": "selective"},
    },
    "embeddings": {"": {}, "tied": {"model.untie_embeddings_and_output_weights": False}},
    "heads": {"": {}, "mha": {"model.num_query_groups": 8}, "mqa": {"model.num_query_groups": 1}},
    "documents": {"": {}, "packed": {"packed": True}},
    "dropout": {
        "": {},
        "hidden-dropout": {"model.hidden_dropout": 0.1},
        "dropout": {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1},
    },
}


@dataclass(frozen=True)
class Case:
    """One label of each axis, in the order of AXES."""

    labels: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(label for label in self.labels if label)

    @property
    def _changes(self) -> Changes:
        merged: Changes = {}
        for values, label in zip(AXES.values(), self.labels, strict=True):
            merged |= values[label]
        return merged

    @property
    def layout(self) -> Layout:
        fields = Layout.__dataclass_fields__
        return Layout(**{name: value for name, value in self._changes.items() if name in fields})

    @property
    def settings(self) -> Changes:
        """What is no part of the layout."""
        return {name: value for name, value in self._changes.items() if name not in Layout.__dataclass_fields__}

    @property
    def model(self) -> Changes:
        """The settings that one process must share to have the same numbers."""
        return {name: value for name, value in self.settings.items() if not name.startswith("recompute.")}

    def says_something(self) -> bool:
        """It is not the one process itself, and none of its labels is without effect."""
        layout, settings = self.layout, self.settings
        if layout == Layout() and settings == self.model:
            return False
        return (layout.zero == 1 or layout.dp * layout.cp > 1) and (layout.tp > 1 or not layout.sequence)

    def is_possible(self) -> bool:
        """What the configuration's rules say."""
        settings = {name: value for name, value in self.settings.items() if name != "packed"}
        try:
            configure(self.layout, self.layout.world_size, settings)
        except ConfigError:
            return False
        return True


def case_of(**labels: str) -> Case:
    """A case by axis: case_of(tp="tp2", heads="mha")."""
    assert labels.keys() <= AXES.keys()
    return Case(tuple(labels.get(axis, "") for axis in AXES))


def alone_and_in_pairs(most_ranks: int) -> list[Case]:
    """Every label alone, and of every two axes the first possible pair of labels, on at most so many ranks."""
    found: dict[Case, None] = {}
    for axis, values in AXES.items():
        found |= dict.fromkeys(_usable((case_of(**{axis: label}) for label in values), most_ranks))
    for one, other in combinations(AXES, 2):
        pairs = product(filter(None, AXES[one]), filter(None, AXES[other]))
        usable = _usable((case_of(**{one: a, other: b}) for a, b in pairs), most_ranks)
        found |= dict.fromkeys(case for case, _ in zip(usable, range(1), strict=False))
    return list(found)


def draw(number: int, ranks: range, seed: int = SEED) -> list[Case]:
    """So many different cases at random on a number of ranks in `ranks`; the same for the same seed."""
    generator = random.Random(seed)
    found: dict[Case, None] = {}
    for _ in range(1_000 * number):
        case = Case(tuple(generator.choice(list(values)) for values in AXES.values()))
        if case.layout.world_size in ranks:
            found |= dict.fromkeys(_usable(iter([case]), ranks.stop - 1))
        if len(found) == number:
            return list(found)
    raise AssertionError(f"only {len(found)} of {number} cases found: are the axes too strict?")


def _usable(cases: Iterator[Case], most_ranks: int) -> Iterator[Case]:
    return (
        case for case in cases if case.layout.world_size <= most_ranks and case.says_something() and case.is_possible()
    )
