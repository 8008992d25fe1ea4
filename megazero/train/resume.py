"""Where a run begins: at its own checkpoint, at another's, or at iteration 0; and how it saves.

the run's own `save` folder holds a checkpoint  → resume there (a --load was for the first start only)
else --load DIR                                 → resume from it, or with --finetune take its weights alone
else                                            → a new model
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megazero.base.errors import CheckpointError, ConfigError
from megazero.config.recipe import to_yaml
from megazero.engine.checkpoint import latest_iteration, load, read_state, retain
from megazero.engine.checkpoint import save as save_checkpoint
from megazero.engine.lr import LearningRate, merge
from megazero.engine.optimizer_record import make_room, record
from megazero.train.setup import Run

# Changing one of these in mid-run would change the order of the data without a word.
_DATA_ORDER = {"seed": "training", "seq_length": "data", "split": "data", "mock_data": "data"}


@dataclass
class Progress:
    """How far training is, whatever the layout."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped: int = 0
    """Iterations that changed no weight because of a non-finite number."""


def resume_or_start(run: Run) -> tuple[Progress, LearningRate]:
    """Load what there is to load, saying so first. Collective.

    Raises CheckpointError when --load holds no checkpoint or it does not fit, ConfigError when it was made with other
    data settings or another learning rate's course.
    """
    config = run.config
    derived = [
        name
        for name in ("lr_decay_iters", "lr_wsd_decay_iters")
        if config.origins.get(f"optimizer.{name}", "").startswith("derived")
    ]
    rate = LearningRate.from_config(config.optimizer, derived)
    assert config.checkpoint.save is not None and config.training.train_iters is not None
    own = latest_iteration(config.checkpoint.save) is not None
    source = config.checkpoint.save if own else config.checkpoint.load
    load_is_used_up = own and not _same_folder(config.checkpoint.load or config.checkpoint.save, config.checkpoint.save)
    step = None if load_is_used_up else config.checkpoint.ckpt_step  # which chose among the checkpoints of --load
    if source is None:
        if step is not None:
            raise CheckpointError(
                f"--ckpt-step {step}: {config.checkpoint.save} has no checkpoint yet. Leave it out, or give --load DIR."
            )
        return Progress(), rate
    state = read_state(source, step)
    if config.checkpoint.finetune and not own:
        run.log.main(f"taking the weights of {source}, iteration {state['progress']['iteration']}")
        load(source, step, {"weights": run.engine.pieces(for_save=False)["weights"]}, run.topology.group("world"))
        run.engine.loaded()
        return Progress(), rate
    progress = Progress(**state["progress"])
    if load_is_used_up:
        run.log.main(f"this run has a checkpoint of its own, so --load {config.checkpoint.load} is not used again")
    run.log.main(f"resuming from {source}, iteration {progress.iteration}")
    _check_data_order(run, state["data"])
    stored = LearningRate.from_state(state["learning_rate"])
    rate, warning = merge(
        rate,
        stored,
        updates=progress.iteration - progress.skipped,
        train_iters=config.training.train_iters,
        override=config.checkpoint.override_opt_param_scheduler,
    )
    if warning and run.launch.rank == 0:
        run.log.warn(warning)
    if state["optimizer"]["kind"] != config.optimizer.optimizer:
        raise ConfigError(
            f"--optimizer {config.optimizer.optimizer}, but {source} has the state of {state['optimizer']['kind']}. "
            "Give the same optimizer, or start from its weights alone with --finetune and another --output-dir."
        )
    assert run.engine.shards is not None
    make_room(run.engine.shards, state["optimizer"])
    load(source, step, run.engine.pieces(for_save=False), run.topology.group("world"))
    run.engine.loaded()
    if run.engine.scaler is not None and state.get("loss_scaler") is not None:
        run.engine.scaler.load(state["loss_scaler"])
    return progress, rate


def save(run: Run, progress: Progress, rate: LearningRate) -> None:
    """Write a checkpoint of this moment and drop the oldest beyond --keep-last. Collective."""
    config, optimizer = run.config, run.engine.shards
    assert optimizer is not None and config.checkpoint.save is not None
    state = {
        "progress": asdict(progress),
        "learning_rate": rate.state(),
        "data": _data_order(run),
        "loss_scaler": None if run.engine.scaler is None else run.engine.scaler.state(),
        "optimizer": {"kind": config.optimizer.optimizer} | record(optimizer, run.topology.group("world")),
    }
    save_checkpoint(
        config.checkpoint.save,
        progress.iteration,
        run.engine.pieces(for_save=True),
        state,
        to_yaml(config),
        run.topology.group("world"),
    )
    if config.checkpoint.keep_last is not None and run.launch.rank == 0:
        retain(config.checkpoint.save, config.checkpoint.keep_last)


def _same_folder(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _data_order(run: Run) -> dict[str, Any]:
    return {name: getattr(getattr(run.config, section), name) for name, section in _DATA_ORDER.items()}


def _check_data_order(run: Run, stored: dict[str, Any]) -> None:
    now = _data_order(run)
    problems = [
        f"{name} is {now[name]!r}, but the checkpoint's run has {stored.get(name)!r}: the order of the data would "
        f"change in mid-run. Give --{name.replace('_', '-')} {stored.get(name)}, or start anew from its weights with "
        "--finetune and another --output-dir."
        for name in now
        if now[name] != stored.get(name)
    ]
    if problems:
        raise ConfigError(*problems)
