"""The numerics suite's result as a person reads it: how far stages, precisions and homes of state are from plain torch.

Tests leave rows with pytest's `record_property`; tests/conftest.py prints the tables at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.numerics.compare import TOLERANCES, kind_of, share
from tests.numerics.setting import Run

RUN, FAULT, LINE = "numerics run", "numerics fault", "numerics line"
Record = Callable[[str, object], None]


def record_run(record_property: Record, run: Run, errors: dict[str, float]) -> None:
    """Leave a row for a run."""
    record_property(RUN, (run, errors))


def record_fault(record_property: Record, name: str, run: Run, errors: dict[str, float]) -> None:
    """Leave a row for a fault made on purpose."""
    record_property(FAULT, (name, share(run, errors)))


def record_line(record_property: Record, title: str, line: str) -> None:
    """Leave a line of another table, which has its own title."""
    record_property(LINE, (title, line))


def tables(properties: Iterable[tuple[str, Any]], everything: bool) -> list[str]:
    """All tables; nothing if there are no rows."""
    found = list(properties)
    lines = _runs([value for name, value in found if name == RUN], everything)
    faults = [value for name, value in found if name == FAULT]
    if faults:
        lines.append(f"{len(faults)} faults made on purpose: {sum(of > 1 for _, of in faults)} seen")
        lines += [f"  {name}: {of:.1e} of what is allowed" for name, of in faults if everything or of <= 1]
    titles: dict[str, list[str]] = {}
    for name, value in found:
        if name == LINE:
            titles.setdefault(value[0], []).append(f"  {value[1]}")
    for title, rows in titles.items():
        lines += [title, *rows]
    return lines


def _runs(rows: list[tuple[Run, dict[str, float]]], everything: bool) -> list[str]:
    if not rows:
        return []
    groups: dict[str, list[tuple[Run, dict[str, float]]]] = {}
    for run, errors in rows:
        name = str(run) if everything else f"stage {run.stage} {run.precision}"
        groups.setdefault(name, []).append((run, errors))
    kinds = list(TOLERANCES["fp32"])
    width = max(map(len, groups))
    lines = [
        f"{len(rows)} runs of 10 steps against plain torch: largest error in loss, gradient norm (relative) and weight",
        f"{'':{width}}  runs  " + "  ".join(f"{kind:>8}" for kind in kinds) + "  of what is allowed",
    ]
    for name, members in sorted(groups.items()):
        worst = "  ".join(f"{max(errors[kind] for _, errors in members):8.1e}" for kind in kinds)
        largest = max(share(run, errors) for run, errors in members)
        lines.append(f"{name:{width}}  {len(members):4}  {worst}  {largest:.2f}")
    for kind in dict.fromkeys(kind_of(run) for run, _ in rows):
        allowed = "  ".join(f"{tolerance:8.1e}" for tolerance in TOLERANCES[kind].values())
        lines.append(f"{'allowed, ' + kind:{width}}        {allowed}")
    return lines
