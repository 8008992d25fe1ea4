"""TensorBoard and Weights & Biases: the records of metrics.jsonl, sent on when asked for.

Trackers fail soft: whatever goes wrong in one costs a warning and that tracker, never the run. metrics.jsonl has
everything all the same. Only rank 0 opens trackers.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megazero.base.log import Log
from megazero.base.optional import require
from megazero.config.schema import LoggingConfig, RunConfig
from megazero.train.records import Record


class Tracker(Protocol):
    """Takes records; may raise anything."""

    def log(self, record: Record) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """The trackers that a configuration asks for, each switched off at its first failure."""

    def __init__(self, config: RunConfig, log: Log, resumed_at: int) -> None:
        self._log = log
        self._open: dict[str, Tracker] = {}
        if config.logging.tensorboard_dir is not None:
            self._try("TensorBoard", lambda: TensorBoard(config.logging, resumed_at))
        if config.logging.wandb_project is not None:
            self._try("Weights & Biases", lambda: WeightsAndBiases(config, resumed_at, log))

    def log(self, record: Record) -> None:
        """Send one record to each tracker that still works."""
        for name, tracker in list(self._open.items()):
            self._guard(name, partial(tracker.log, record))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._guard(name, tracker.close)
        self._open.clear()

    def _try(self, name: str, make: Callable[[], Tracker]) -> None:
        def keep() -> None:
            self._open[name] = make()

        self._guard(name, keep)

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - a tracker may fail with anything, and never stops training
            self._open.pop(name, None)
            self._log.warn(f"{name} is off from here on, the run continues ({type(error).__name__}: {error})")


class TensorBoard:
    """Scalars tagged with the record's keys. Resuming at iteration k hides what an earlier process wrote after k."""

    def __init__(self, config: LoggingConfig, resumed_at: int) -> None:
        require("tensorboard", pip="tensorboard", purpose="for --tensorboard-dir")
        writer = require("torch.utils.tensorboard", pip="tensorboard", purpose="for --tensorboard-dir").SummaryWriter
        self._writer = writer(config.tensorboard_dir, purge_step=resumed_at + 1 if resumed_at else None)

    def log(self, record: Record) -> None:
        for key, value in _measured(record).items():
            self._writer.add_scalar(key, value, record["iteration"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for each output-dir, continued when the run resumes (its id is kept in wandb_run_id there).

    Without a login or a server in reach it goes offline, with one warning: `wandb sync` uploads it later.
    """

    def __init__(self, config: RunConfig, resumed_at: int, log: Log) -> None:
        wandb = require("wandb", pip="wandb", purpose="for --wandb-project")
        assert config.logging.output_dir is not None, "output_dir is not filled in: resolve the configuration first"
        folder = Path(config.logging.output_dir)
        settings = asdict(config)
        del settings["origins"]
        arguments: dict[str, Any] = {
            "project": config.logging.wandb_project,
            "name": config.logging.wandb_exp_name or folder.name,
            "dir": str(folder),
            "config": settings,
        }
        kept_id = folder / "wandb_run_id"
        quick = wandb.Settings(init_timeout=20, login_timeout=20, console="off")  # seconds; stdout is ours
        try:
            self._run = wandb.init(**arguments, id=_run_id(kept_id, resumed_at), resume="allow", settings=quick)
        except Exception as error:  # noqa: BLE001 - no key, no network, no permission: each its own type
            # Of a new id: after a time-out, W&B holds the old one as "in use" for the rest of this process.
            self._run = wandb.init(**arguments, id=_run_id(kept_id, 0), mode="offline", settings=quick)
            log.warn(
                f"Weights & Biases is offline, upload later with `wandb sync {folder}/wandb/offline-run-*` "
                f"({type(error).__name__}: {error})"
            )
        self._run.define_metric("*", step_metric="iteration")  # lets a resumed run go over the same iterations again

    def log(self, record: Record) -> None:
        self._run.log({"iteration": record["iteration"], **_measured(record)})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, resumed_at: int) -> str:
    """The stored id of the W&B run that is being resumed, or a new one, stored."""
    if resumed_at and path.exists():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex[:12]
    path.write_text(name + "\n", encoding="utf-8")
    return name


def _measured(record: Record) -> dict[str, Any]:
    """What there is a number for, without the iteration itself; {"a": {"b": 1}} becomes {"a/b": 1}."""
    flat = _flat("", record)
    return {key: value for key, value in flat if value is not None and key != "iteration"}


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}/", value)
        else:
            yield f"{prefix}{key}", value
