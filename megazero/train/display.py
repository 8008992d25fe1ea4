"""What a person sees of a run: Megatron's lines in logs, a progress bar on a terminal.

Many scripts parse Megatron's line, so its fields, order and number formats are Megatron-LM's (`training_log` and
`evaluate_and_print_results` of megatron/training/training.py).
"""

from __future__ import annotations

import math
import sys
from datetime import datetime
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from megazero.base.log import Log
from megazero.config.schema import RunConfig
from megazero.train.records import StepRecord, ValidationRecord


class Display(Protocol):
    """Shows records as they come."""

    def step(self, record: StepRecord, skipped: int, nan: int) -> None:
        """One log interval, of which `skipped` iterations changed no weight and `nan` had a NaN loss."""

    def validation(self, record: ValidationRecord) -> None: ...

    def close(self) -> None: ...


def open_display(config: RunConfig, log: Log, resumed_at: int) -> Display:
    """The display that logging.progress asks for; `auto` is the progress bar if stdout is a terminal."""
    progress = config.logging.progress
    assert config.training.train_iters is not None, "train_iters is not filled in: resolve the configuration first"
    if progress == "rich" or (progress == "auto" and sys.stdout.isatty()):
        console = Console(force_terminal=True if progress == "rich" else None, highlight=False)
        return ProgressBar(config.training.train_iters, resumed_at, console)
    assert config.training.global_batch_size is not None
    return MegatronLines(config.training.train_iters, config.training.global_batch_size, log)


class MegatronLines:
    """One line a record, through the log."""

    def __init__(self, train_iters: int, global_batch_size: int, log: Log) -> None:
        self._train_iters, self._global_batch_size, self._log = train_iters, global_batch_size, log

    def step(self, record: StepRecord, skipped: int, nan: int) -> None:
        numbers = (
            f"{record['iteration']:8d}/{self._train_iters:8d} | "
            "consumed samples: {consumed_samples:12d} | "
            "elapsed time per iteration (ms): {iteration_time_ms:.1f} | "
            "throughput per GPU (TFLOP/s/GPU): {tflops_per_device:.1f} | "
            "learning rate: {learning_rate:.6E} | "
            f"global batch size: {self._global_batch_size:5d} | "
            "lm loss: {lm_loss:.6E} | "
            "loss scale: {loss_scale:.1f} | "
            "grad norm: {grad_norm:.3f} | "
            f"number of skipped iterations: {skipped:3d} | "
            f"number of nan iterations: {nan:3d} |"
        ).format(**record)
        self._log.main(f" [{datetime.now():%Y-%m-%d %H:%M:%S.%f}] iteration {numbers}")

    def validation(self, record: ValidationRecord) -> None:
        loss = record["validation_loss"]
        line = (
            f" validation loss at iteration {record['iteration']} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {_perplexity(loss):.6E} | "
        )
        rule = "-" * (len(line) + 1)
        self._log.main(f"{rule}\n{line}\n{rule}")

    def close(self) -> None:
        """Nothing is held."""


class ProgressBar:
    """A bar at the bottom of the terminal; whatever is printed meanwhile appears above it."""

    def __init__(self, train_iters: int, resumed_at: int, console: Console) -> None:
        self._console = console
        # no_wrap: on a narrow terminal the bar gives way, not the numbers
        self._progress = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=2,
            speed_estimate_period=600,
            expand=True,
        )
        self._task = self._progress.add_task("", total=train_iters, completed=resumed_at, numbers="")
        self._progress.start()

    def step(self, record: StepRecord, skipped: int, nan: int) -> None:
        numbers = "loss {lm_loss:.4f}  lr {learning_rate:.2e}  {tokens_per_second:,.0f} tokens/s  ETA".format(**record)
        self._progress.update(self._task, completed=record["iteration"], numbers=numbers)
        if skipped or nan:
            self._console.print(f"iteration {record['iteration']}: {skipped} iterations skipped, {nan} with a NaN loss")

    def validation(self, record: ValidationRecord) -> None:
        loss = record["validation_loss"]
        self._console.print(
            f"iteration {record['iteration']}: validation loss {loss:.4f}, perplexity {_perplexity(loss):,.2f}"
        )

    def close(self) -> None:
        self._progress.stop()


def _perplexity(loss: float) -> float:
    return math.exp(min(20.0, loss))  # Megatron's cap
