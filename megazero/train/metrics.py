"""A run's numbers, from the loop to file, screen and trackers; and the summary at its end.

    with Metrics(config, is_main=rank == 0, resumed_at=iteration) as metrics:
        metrics.step({…})        each log interval
        metrics.validation({…})  each validation
        metrics.finish()         at the end of training: the summary

All ranks may call; only the main one writes. Leaving the `with` closes everything and draws loss.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megazero.base.log import Log
from megazero.config.schema import RunConfig
from megazero.train.display import open_display
from megazero.train.plot import plot_losses
from megazero.train.records import MetricsFile, Record, StepRecord, ValidationRecord, read_records
from megazero.train.trackers import Trackers

METRICS_FILE = "metrics.jsonl"
LOSS_PICTURE = "loss.png"


class Metrics:
    """Takes the loop's records to metrics.jsonl, the display and the trackers of a resolved configuration.

    Raises ConfigError when output-dir cannot be written, DataError when its metrics.jsonl is damaged.
    """

    def __init__(self, config: RunConfig, *, is_main: bool, resumed_at: int = 0) -> None:
        self._log = Log()
        self._outputs: tuple[MetricsFile, Trackers] | None = None
        if not is_main:
            return
        assert config.logging.output_dir is not None, "output_dir is not filled in: resolve the configuration first"
        self._folder = Path(config.logging.output_dir)
        file = MetricsFile(self._folder / METRICS_FILE, resumed_at)
        self._skipped = file.skipped
        self._outputs = file, Trackers(config, self._log, resumed_at)
        self._display = open_display(config, self._log, resumed_at)

    def step(self, record: StepRecord, nan_iterations: int = 0) -> None:
        """One log interval; `nan_iterations` of its steps had a NaN loss (shown, not stored)."""
        assert record.keys() == StepRecord.__annotations__.keys()
        if self._store(record):
            skipped, self._skipped = record["skipped_iterations"] - self._skipped, record["skipped_iterations"]
            self._display.step(record, skipped, nan_iterations)

    def validation(self, record: ValidationRecord) -> None:
        """One validation."""
        assert record.keys() == ValidationRecord.__annotations__.keys()
        if self._store(record):
            self._display.validation(record)

    def message(self, text: str) -> None:
        """A line for people, from the main rank alone; it appears above a progress bar."""
        if self._outputs is not None:
            self._log.main(text)

    def finish(self, sample: str | None = None) -> None:
        """Close, then say the run's summary and what the trained model writes."""
        if self._outputs is None:
            return
        self.close()
        self._log.main(summary(self._folder / METRICS_FILE).text())
        if sample is not None:
            self._log.main(f"What the model writes:\n\n{sample}\n")

    def close(self) -> None:
        """End display and trackers, close the file, draw loss.png. A second call does nothing."""
        if self._outputs is None:
            return
        file, trackers = self._outputs
        self._outputs = None
        self._display.close()
        file.close()
        trackers.close()
        plot_losses(self._folder / METRICS_FILE, self._folder / LOSS_PICTURE, self._log, title=self._folder.name)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _store(self, record: Record) -> bool:
        if self._outputs is None:
            return False
        file, trackers = self._outputs
        file.append(record)
        trackers.log(record)
        return True


@dataclass(frozen=True)
class Summary:
    """A finished run in a few numbers; None where nothing was measured."""

    folder: Path
    iteration: int
    consumed_tokens: int
    first_validation: dict[str, Any] | None
    last_validation: dict[str, Any] | None
    last_loss: float | None
    tokens_per_second: float | None
    """Median over the log intervals, so that compilation and pauses don't count."""
    tflops_per_device: float | None
    mfu: float | None
    communication_bytes: dict[str, dict[str, int]]
    """Of rank 0 in the last step on record, by axis and operation."""
    communication_calls: dict[str, dict[str, int]]

    def text(self) -> str:
        """The summary for people, with the files to look at next."""
        lines = [f"{self.iteration:,} iterations, {self.consumed_tokens:,} tokens"]
        first, last = self.first_validation, self.last_validation
        if first is not None and last is not None:
            line = f"  validation loss  {first['validation_loss']:.4f} at iteration {first['iteration']:,}"
            if last["iteration"] > first["iteration"]:
                change = last["validation_loss"] - first["validation_loss"]
                line += f" -> {last['validation_loss']:.4f} at iteration {last['iteration']:,} ({change:+.2f} nats)"
            lines.append(line)
        if self.last_loss is not None:
            lines.append(f"  training loss    {self.last_loss:.4f}")
        if self.tokens_per_second is not None and self.tflops_per_device is not None:
            share = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
            lines.append(
                f"  speed            {self.tokens_per_second:,.0f} tokens/s, "
                f"{self.tflops_per_device:.3g} TFLOP/s per device{share} (medians)"
            )
        lines += self._communication()
        found = [(name, what) for name, what in _LOOK_NEXT if (self.folder / name).exists()]
        if found:
            lines += [f"Where to look next, in {self.folder}/:", *(f"  {name:<15}{what}" for name, what in found)]
        return "\n".join(lines)

    def _communication(self) -> list[str]:
        """A line for each axis and operation; none where nothing was sent."""
        lines = []
        for axis, operations in self.communication_bytes.items():
            for name, sent in operations.items():
                calls = self.communication_calls.get(axis, {}).get(name)
                times = "" if calls is None else f" in {calls:,} call{'s' * (calls != 1)}"
                lines.append(f"    {axis:<8}{name:<16}{sent / 2**20:>12,.3f} MiB{times}")
        return ["  communication    sent by rank 0 in a step, by axis and operation", *lines] if lines else []


_LOOK_NEXT = (
    (LOSS_PICTURE, "training and validation loss, drawn"),
    ("samples.txt", "what the trained model writes"),
    (METRICS_FILE, "every number behind this, one JSON object a line"),
    ("config.yaml", "all settings, and where each came from"),
    ("checkpoints", "weights and optimizer: the same command with a higher --train-iters goes on from here"),
)


def summary(metrics: Path) -> Summary:
    """The summary of the run whose metrics.jsonl this is. Raises DataError when a line of it is damaged."""
    records = read_records(metrics)
    steps = [r for r in records if "lm_loss" in r]
    validations = [r for r in records if r.get("validation_loss") is not None]
    return Summary(
        folder=metrics.parent,
        iteration=max((r["iteration"] for r in records), default=0),
        consumed_tokens=max((r["consumed_tokens"] for r in steps), default=0),
        first_validation=validations[0] if validations else None,
        last_validation=validations[-1] if validations else None,
        last_loss=steps[-1]["lm_loss"] if steps else None,
        tokens_per_second=_median(steps, "tokens_per_second"),
        tflops_per_device=_median(steps, "tflops_per_device"),
        mfu=_median(steps, "mfu"),
        communication_bytes=steps[-1].get("communication_bytes", {}) if steps else {},
        communication_calls=steps[-1].get("communication_calls", {}) if steps else {},
    )


def _median(records: list[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in records if r[key] is not None]
    return median(values) if values else None
