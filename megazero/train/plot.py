"""loss.png: the training and validation loss of a metrics.jsonl over iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megazero.base.log import Log
from megazero.base.optional import MissingPackageError, require
from megazero.train.records import read_records


def plot_losses(metrics: Path, picture: Path, log: Log, title: str = "") -> bool:
    """Draw `metrics` (a metrics.jsonl) as `picture`; says whether it did.

    Draws nothing when there is no loss yet, nor, with one warning, when matplotlib is missing.
    """
    records = read_records(metrics)
    train = [(r["iteration"], r["lm_loss"]) for r in records if r.get("lm_loss") is not None]
    validation = [(r["iteration"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    if not train and not validation:
        return False
    try:
        figure = require("matplotlib.figure", pip="matplotlib", purpose="to draw loss.png").Figure
    except MissingPackageError as error:
        log.warn_once(str(error))
        return False
    _draw(figure(figsize=(8, 4.5), dpi=120, layout="constrained"), train, validation, title).savefig(picture)
    return True


def _draw(figure: Any, train: list[tuple[int, float]], validation: list[tuple[int, float]], title: str) -> Any:
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1.2, label="train")
    if validation:
        last = validation[-1][1]
        label = f"validation (last {last:.3f})"
        axes.plot(
            *zip(*validation, strict=True), color="tab:orange", linewidth=1.8, marker="o", markersize=4, label=label
        )
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
