"""metrics.jsonl: one JSON object a line, a training line each log interval and a validation line each validation.

Not-finite numbers are written as null (JSON has no NaN). Lines are flushed one by one, so a kill costs at most the line
being written, and readers tolerate such a last line. A resumed run continues the file as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from megazero.base.errors import ConfigError, DataError


class StepRecord(TypedDict):
    """What one log interval of training looked like: the keys of a training line."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    lm_loss: float
    """Mean over the interval, nats per token."""
    learning_rate: float
    """Of the interval's last step."""
    grad_norm: float
    """Of the interval's last step, before clipping."""
    loss_scale: float
    iteration_time_ms: float
    """Mean over the interval."""
    tokens_per_second: float
    """Over all ranks."""
    tflops_per_device: float
    """Model FLOPs, without recomputation."""
    mfu: float | None
    """Share of the device's peak, 0 to 1; None where the peak is unknown."""
    memory_bytes: int
    communication_bytes: dict[str, dict[str, int]]
    """What rank 0 handed to the network in the interval's last step, by axis and operation; parallel/traffic.py says
    what is counted."""
    communication_calls: dict[str, dict[str, int]]
    """The same in calls."""
    skipped_iterations: int
    """Since the beginning of training, because of non-finite losses or gradients."""


class ValidationRecord(TypedDict):
    """One validation: the keys of a validation line."""

    iteration: int
    consumed_samples: int
    validation_loss: float
    """Mean over the validation tokens, nats."""


Record = StepRecord | ValidationRecord


class MetricsFile:
    """metrics.jsonl of a run that starts or resumes after `resumed_at` iterations, open for appending.

    Resuming at iteration k removes the lines after k, atomically. A fresh run (k = 0) moves an earlier run's file
    aside as metrics.jsonl.old, over an older one.

    Raises ConfigError when the folder cannot be written, DataError when a line other than the last is damaged.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        kept: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and resumed_at == 0:
                os.replace(path, path.with_name(path.name + ".old"))
            elif path.exists():
                kept = [record for record in read_records(path) if record["iteration"] <= resumed_at]
                _rewrite(path, kept)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror or error}): a run records its metrics there. "
                "Give a writable folder with --output-dir."
            ) from error
        self.skipped: int = next((r["skipped_iterations"] for r in reversed(kept) if "skipped_iterations" in r), 0)
        """`skipped_iterations` of the last training line that was kept."""

    def append(self, record: Record) -> None:
        """Write one line."""
        self._file.write(_line(record))

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order, without a last line that a kill cut short. Numbers may be None.

    Raises DataError with file and line number for any other line that is not a record.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["iteration"], int):
                raise TypeError("its iteration is not a whole number")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number}, is not a metrics record ({type(error).__name__}: {error}). "
                "Repair or delete that line, or move the file away."
            ) from error
        records.append(record)
    return records


def _rewrite(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, records))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _line(record: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
