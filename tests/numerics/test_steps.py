"""Stage × precision × accumulation × clip × offload × ranks: ten steps are those of plain torch in one process.

Every run is also held to the bits of the runs that sum in its order. By default a cover in which every pair of values
meets; the whole product with -m slow.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.numerics.compare import deviations, order_of, same_bits, share
from tests.numerics.plain import plain
from tests.numerics.setting import CLIP, Outcome, Recipe, Run
from tests.numerics.sharded import outcomes
from tests.numerics.table import Record, record_run

KINDS = [(0, "none"), *itertools.product((1, 2, 3), ("none", "cpu", "nvme"))]
"""Stage and offload: at stage 0 there are no shards to offload."""
RECIPES = {
    ("fp32", 1): Recipe("fp32", 1, False, 2),
    ("fp32", 4): Recipe("fp32", 4, True, 4),
    ("bf16", 1): Recipe("bf16", 1, True, 4),
    ("bf16", 4): Recipe("bf16", 4, False, 2),
    ("fp16", 1): Recipe("fp16", 1, False, 4),
    ("fp16", 4): Recipe("fp16", 4, True, 2),
}
HALVES = [
    [(0, "none"), (1, "none"), (2, "cpu"), (3, "none"), (3, "nvme")],
    [(1, "cpu"), (1, "nvme"), (2, "none"), (2, "nvme"), (3, "cpu")],
]
"""Each with one recipe of every precision: (1, 1, 4) micro-batches the first, (4, 4, 1) the second."""


def of(recipe: Recipe, kinds: list[tuple[int, str]]) -> list[Run]:
    return [
        Run(stage, recipe.precision, recipe.accumulation, recipe.clip, offload, recipe.ranks)
        for stage, offload in kinds
    ]


def cover() -> list[Run]:
    runs = []
    for half, accumulations in zip(HALVES, ((1, 1, 4), (4, 4, 1)), strict=True):
        for precision, accumulation in zip(("fp32", "bf16", "fp16"), accumulations, strict=True):
            runs += of(RECIPES[precision, accumulation], half)
    return runs


def check(ranks: Ranks, runs: list[Run], folder: Path, record: Record, timeout: float = 60) -> None:
    """Train them all, compare each with plain torch, and with those that sum in its order."""
    (size,) = {run.ranks for run in runs}
    found = ranks.run(outcomes, size, runs, str(folder), timeout=timeout)[0]
    first: dict[tuple[object, ...], tuple[Run, Outcome]] = {}
    far, differ = [], []
    for run, outcome in zip(runs, found, strict=True):
        errors = deviations(outcome, plain(run.recipe))
        record_run(record, run, errors)
        if share(run, errors) > 1:
            far.append(f"{run}: {errors} {outcome.copies_differ}")
        one, wanted = first.setdefault(order_of(run), (run, outcome))
        if not same_bits(outcome, wanted):
            differ.append(f"{run} and {one}")
    assert not far, "away from plain torch:\n" + "\n".join(far)
    assert not differ, "not the same bits:\n" + "\n".join(differ)


@pytest.mark.parametrize("size", [2, 4])
def test_steps_are_those_of_plain_torch(ranks: Ranks, size: int, tmp_path: Path, record_property: Record) -> None:
    check(ranks, [run for run in cover() if run.ranks == size], tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_whole_product(ranks: Ranks, size: int, precision: str, tmp_path: Path, record_property: Record) -> None:
    recipes = [Recipe(precision, accumulation, clip, size) for accumulation in (1, 4) for clip in (False, True)]
    check(ranks, [run for recipe in recipes for run in of(recipe, KINDS)], tmp_path, record_property, timeout=280)


def test_every_pair_of_values_meets() -> None:
    def values(run: Run) -> dict[str, object]:
        kind = (run.stage, run.offload)
        return {"kind": kind, "precision": run.precision, "g": run.accumulation, "clip": run.clip, "ranks": run.ranks}

    whole = [
        Run(stage, precision, accumulation, clip, offload, size)
        for (stage, offload), precision, accumulation, clip, size in itertools.product(
            KINDS, ("fp32", "bf16", "fp16"), (1, 4), (False, True), (2, 4)
        )
    ]
    assert len(whole) == len(set(whole)) == 240

    def pairs(runs: list[Run]) -> set[object]:
        return {pair for run in runs for pair in itertools.combinations(values(run).items(), 2)}

    assert pairs(cover()) == pairs(whole)
    assert len(cover()) == 30


def test_the_reference_sees_what_it_should() -> None:
    """Some steps are clipped and some not; the dynamic scale overflows, and grows again."""
    norms = plain(Recipe("fp32", 1, True, 2)).norms
    assert min(norms) < CLIP < max(norms)
    skipped = plain(Recipe("fp16", 4, True, 2)).skipped
    first = skipped.index(False)
    assert first >= 1 and sum(skipped) <= 5, "overflows at the start"
    assert any(skipped[first:]), "the scale has grown until it overflowed again"
