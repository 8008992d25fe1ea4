"""The parity suite's result as a person reads it: each layout's largest errors, and each fault with what saw it.

Tests leave rows with pytest's `record_property`; tests/conftest.py prints the tables at the end: the worst layouts, or
all of them with -v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.parity.compare import GRADIENT, LOSS, NORM, WEIGHT

LAYOUT, FAULT = "parity layout", "parity fault"
TOLERANCES = {"loss": LOSS, "norm": NORM, "gradient": GRADIENT, "weight": WEIGHT}
"""The first three relative, the last absolute. A gradient's error is relative to its norm + 3e-4 of the global norm."""
_SHOWN = 5

Record = Callable[[str, object], None]
Row = tuple[str, dict[str, float]]
"""Name and errors, in the units of TOLERANCES."""


def record_layout(record_property: Record, name: str, shares: dict[str, float]) -> None:
    """Leave a row for a layout; `shares` are of tests.parity.compare.worst."""
    record_property(LAYOUT, (name, _errors(shares)))


def record_fault(record_property: Record, name: str, shares: dict[str, float]) -> None:
    """Leave a row for a fault made on purpose."""
    record_property(FAULT, (name, _errors(shares)))


def _errors(shares: dict[str, float]) -> dict[str, float]:
    return {kind: shares[kind] * tolerance for kind, tolerance in TOLERANCES.items()}


def tables(properties: Iterable[tuple[str, Any]], everything: bool) -> list[str]:
    """Both tables from the properties of all tests; nothing if there are no rows."""
    found = list(properties)
    layouts: list[Row] = [value for name, value in found if name == LAYOUT]
    faults: list[Row] = [value for name, value in found if name == FAULT]
    return [*_layouts(layouts, everything), *_faults(faults, everything)]


def _layouts(rows: list[Row], everything: bool) -> list[str]:
    if not rows:
        return []
    shown = rows if everything else sorted(rows, key=lambda row: -_share(row))[:_SHOWN]
    width = max(len(name) for name, _ in [*shown, ("largest of them all", {})])
    head = "  ".join(f"{kind:>9}" for kind in TOLERANCES)
    lines = [
        f"{len(rows)} layouts against one process in fp32: largest error in loss, gradient norm, gradient (relative)",
        "and weight (absolute)" + ("" if everything else f"; the {len(shown)} worst, all with -v"),
        f"{'':{width}}  {head}",
        *(_line(name, errors, width) for name, errors in shown),
    ]
    largest = {kind: max(errors[kind] for _, errors in rows) for kind in TOLERANCES}
    return [*lines, _line("largest of them all", largest, width), _line("tolerance", TOLERANCES, width)]


def _line(name: str, errors: dict[str, float], width: int) -> str:
    return f"{name:{width}}  " + "  ".join(f"{errors[kind]:9.1e}" for kind in TOLERANCES)


def _faults(rows: list[Row], everything: bool) -> list[str]:
    if not rows:
        return []
    seen = sum(_share(row) > 1 for row in rows)
    lines = [f"{len(rows)} faults made on purpose: {seen} seen"]
    if everything or seen < len(rows):
        width = max(len(name) for name, _ in rows)
        for name, errors in rows:
            kind = max(TOLERANCES, key=lambda kind: errors[kind] / TOLERANCES[kind])
            lines.append(f"  {name:{width}}  {kind} off by {errors[kind]:.1e}, tolerance {TOLERANCES[kind]:g}")
    return lines


def _share(row: Row) -> float:
    return max(row[1][kind] / tolerance for kind, tolerance in TOLERANCES.items())
