"""Faults made on purpose are seen, by a wide margin; the same runs without them are quiet."""

from __future__ import annotations

from pathlib import Path

from tests.harness import Ranks
from tests.numerics.compare import deviations, share
from tests.numerics.faults import FAULTS, HARMLESS
from tests.numerics.plain import plain
from tests.numerics.setting import Outcome
from tests.numerics.sharded import outcome, outcomes
from tests.numerics.table import Record, record_fault

MARGIN = 10
"""A fault must be off by so many times what is allowed."""


def faulty(folder: str) -> dict[str, Outcome | None]:
    return {name: outcome(run, folder, change) for name, (run, change) in FAULTS.items()}


def test_faults_are_seen(ranks: Ranks, tmp_path: Path, record_property: Record) -> None:
    missed = []
    for name, found in ranks.run(faulty, 2, str(tmp_path))[0].items():
        run, _ = FAULTS[name]
        found.copies_differ = ""  # the numbers alone must tell
        errors = deviations(found, plain(run.recipe))
        record_fault(record_property, name, run, errors)
        if share(run, errors) <= MARGIN:
            missed.append(f"{name}: {errors}")
    assert not missed, missed


def test_without_faults_it_is_quiet(ranks: Ranks, tmp_path: Path) -> None:
    for run, found in zip(HARMLESS, ranks.run(outcomes, 2, HARMLESS, str(tmp_path))[0], strict=True):
        assert share(run, deviations(found, plain(run.recipe))) <= 1, run
