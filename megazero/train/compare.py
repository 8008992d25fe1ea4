"""Two runs side by side: where their numbers part, by how much, and which settings may be why.

    deviation of a and b = |a - b| / max(|a|, |b|), at the iterations that both have in metrics.jsonl

Tolerances are those that DESIGN.md's parity matrix holds one layout against another with, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazero.base.errors import DataError
from megazero.config.recipe import resolved_values
from megazero.train.metrics import METRICS_FILE
from megazero.train.records import read_records

LOSS_RTOL, GRAD_NORM_RTOL, WEIGHT_ATOL = 1e-5, 1e-4, 2e-5
"""Relative, relative, absolute."""
_LAYOUT = ("parallel.", "recompute.", "training.micro_batch_size", "training.compile")
_WHERE = (
    *("logging.output_dir", "logging.progress", "logging.tensorboard_dir", "logging.wandb", "dry_run."),
    *("data.data_cache_path", "checkpoint.save", "checkpoint.keep_last"),
)


@dataclass(frozen=True)
class Point:
    """One number at one iteration of both runs; None was not finite."""

    iteration: int
    a: float | None
    b: float | None

    @property
    def deviation(self) -> float:
        if self.a == self.b:
            return 0.0
        if self.a is None or self.b is None:
            return math.inf
        return abs(self.a - self.b) / max(abs(self.a), abs(self.b))

    def __str__(self) -> str:
        return f"{_number(self.a)} | {_number(self.b)} at iteration {self.iteration}"


@dataclass(frozen=True)
class Curve:
    """One kind of number over the common iterations."""

    name: str
    points: tuple[Point, ...]
    tolerance: float
    """Largest deviation that counts as equal."""

    @property
    def first_unequal(self) -> Point | None:
        return next((point for point in self.points if point.deviation > 0), None)

    @property
    def first_beyond(self) -> Point | None:
        return next((point for point in self.points if point.deviation > self.tolerance), None)

    def text(self) -> list[str]:
        first, beyond = self.first_unequal, self.first_beyond
        head = f"{self.name}, {len(self.points)} iteration{'s' * (len(self.points) != 1)}: "
        if first is None:
            return [head + "equal"]
        worst = max(self.points, key=lambda point: point.deviation)
        verdict = "beyond" if beyond else "within"
        lines = [
            f"{head}largest deviation {worst.deviation:.2e} at iteration {worst.iteration}, "
            f"{verdict} the tolerance {self.tolerance:g}",
            f"  first difference   {first.deviation:.2e}: {first}",
        ]
        if beyond not in (None, first):
            lines.append(f"  first beyond it    {beyond.deviation:.2e}: {beyond}")
        return lines


@dataclass(frozen=True)
class Comparison:
    """Two runs' metrics and settings."""

    curves: tuple[Curve, ...]
    only: tuple[int, int]
    """Training lines of a, and of b, that the other run does not have."""
    layout: tuple[str, ...]
    """Settings of the layout that differ; they should change no number."""
    others: tuple[str, ...]
    """Other settings that differ, where a run writes aside."""

    @property
    def equal(self) -> bool:
        return all(curve.first_beyond is None for curve in self.curves)

    def text(self) -> str:
        lines = [line for curve in self.curves for line in curve.text()]
        for name, count in zip("ab", self.only, strict=True):
            if count:
                lines.append(f"only {name} has {count} more training line{'s' * (count != 1)}")
        for title, differing in (("layout", self.layout), ("other settings, which may be why", self.others)):
            if differing:
                lines += [f"{title} (a | b):", *(f"  {line}" for line in differing)]
        return "\n".join(lines)


def compare_runs(
    a: Path, b: Path, *, loss_rtol: float = LOSS_RTOL, grad_norm_rtol: float = GRAD_NORM_RTOL
) -> Comparison:
    """Compare two run folders by metrics.jsonl and config.yaml.

    Raises DataError when a folder holds no metrics, a line is damaged or the runs have no iteration in common,
    ConfigError when a config.yaml cannot be read.
    """
    runs = [_records(folder) for folder in (a, b)]
    kinds = [("lm_loss", loss_rtol), ("grad_norm", grad_norm_rtol), ("validation_loss", loss_rtol)]
    curves = tuple(curve for name, tolerance in kinds if (curve := _curve(name, tolerance, runs)).points)
    steps = [{record["iteration"] for record in records if "lm_loss" in record} for records in runs]
    if not steps[0] & steps[1]:
        raise DataError(
            f"{a} and {b} have no training iteration in common: {_span(steps[0])} and {_span(steps[1])}. Compare runs "
            "of the same recipe, with the same --log-interval (1 shows the most)."
        )
    differing = list(_differences(settings_of(a), settings_of(b)))
    layout = tuple(text for key, text in differing if key.startswith(_LAYOUT))
    others = tuple(text for key, text in differing if not key.startswith(_LAYOUT))
    return Comparison(curves, (len(steps[0] - steps[1]), len(steps[1] - steps[0])), layout, others)


def settings_of(run: Path) -> dict[str, Any]:
    """The resolved settings that a run left, by recipe key; none if it left none."""
    file = run / "config.yaml"
    return resolved_values(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}


def _records(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_records(folder / METRICS_FILE)
    except OSError as error:
        raise DataError(
            f"{folder / METRICS_FILE} cannot be read ({error.strerror}): give the --output-dir of a run."
        ) from error


def _curve(name: str, tolerance: float, runs: list[list[dict[str, Any]]]) -> Curve:
    a, b = ({record["iteration"]: record[name] for record in records if name in record} for records in runs)
    return Curve(name, tuple(Point(i, a[i], b[i]) for i in sorted(a.keys() & b.keys())), tolerance)


def _differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in dict.fromkeys([*a, *b]) if a and b else ():
        if a.get(key) != b.get(key) and not key.startswith(_WHERE):
            yield key, f"{key}: {a.get(key)} | {b.get(key)}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.9g}"


def _span(iterations: set[int]) -> str:
    return f"{min(iterations)} to {max(iterations)}" if iterations else "none"
