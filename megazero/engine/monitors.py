"""Scalars of each update to TensorBoard, Weights & Biases and csv files, under DeepSpeed's names.

    Train/Samples/train_loss   Train/Samples/lr   Train/Samples/grad_norm   Train/Samples/loss_scale   by samples seen

Monitors fail soft: whatever goes wrong in one costs a warning and that monitor, never the run. Rank 0 alone writes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megazero.base.log import Log
from megazero.base.optional import require

Write = Callable[[int, Mapping[str, float]], None]
"""(samples seen, value by name)"""


class Monitors:
    """What a ds_config's `tensorboard`, `wandb` and `csv_monitor` sections ask for."""

    def __init__(self, options: Mapping[str, Mapping[str, str]], log: Log) -> None:
        self._log = log
        self._open: dict[str, Write] = {}
        if log.rank:
            return
        for name, make in {"tensorboard": _tensorboard, "wandb": _wandb, "csv_monitor": _csv}.items():
            if name in options:
                try:
                    self._open[name] = make(options[name])
                except Exception as error:  # noqa: BLE001 - a monitor may fail with anything, and never stops training
                    self._failed(name, error)

    def write(self, samples: int, values: Mapping[str, float | None]) -> None:
        """Send on what is known of these values."""
        known = {f"Train/Samples/{k}": v for k, v in values.items() if v is not None and not math.isnan(v)}
        for name, write in list(self._open.items()):
            try:
                write(samples, known)
            except Exception as error:  # noqa: BLE001 - as above
                del self._open[name]
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self._log.warn(f"{name} is off from here on, the run continues ({type(error).__name__}: {error})")


def _tensorboard(options: Mapping[str, str]) -> Write:
    torch_tensorboard = require("torch.utils.tensorboard", pip="tensorboard", purpose="for the section tensorboard")
    writer: Any = torch_tensorboard.SummaryWriter(str(Path(options["output_path"], options["job_name"])))

    def write(samples: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, samples)
        writer.flush()

    return write


def _wandb(options: Mapping[str, str]) -> Write:
    wandb: Any = require("wandb", pip="wandb", purpose="for the section wandb")
    run = wandb.init(project=options["project"])
    return lambda samples, values: run.log(dict(values), step=samples)


def _csv(options: Mapping[str, str]) -> Write:
    """One file for each name: rows of samples and value, below a line of titles."""
    folder = Path(options["output_path"], options["job_name"])
    folder.mkdir(parents=True, exist_ok=True)

    def write(samples: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            path = folder / f"{name.replace('/', '_')}.csv"
            new = not path.exists()
            with path.open("a", newline="") as file:
                rows = csv.writer(file)
                if new:
                    rows.writerow(["step", name])
                rows.writerow([samples, value])

    return write
