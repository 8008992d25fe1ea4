"""Checkpoints of an engine that a script drives, in the project's format: any ranks and ZeRO stage load any other's.

    <dir>/ global_step10/ { weights/  optimizer/  config.yaml  state.json  MANIFEST.json }   latest

weights/ holds fp32 masters, frozen parameters and persistent buffers; state.json what is no tensor of the model:
counters, scheduler, loss scale, position in the data, random states, hyper-parameters, the script's `client_state`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megazero.base.errors import CheckpointError
from megazero.config.recipe import to_yaml
from megazero.engine import whole
from megazero.engine.checkpoint import Key, Piece, latest_key, read_state
from megazero.engine.checkpoint import load as load_sections
from megazero.engine.checkpoint import save as save_sections
from megazero.engine.optimizer_record import check_fits, make_room, record
from megazero.engine.optimizer_view import load_settings, settings_of
from megazero.engine.parts import Parts
from megazero.engine.steps import key_of, step_folder
from megazero.engine.together import Together
from megazero.engine.values import decode, encode
from megazero.parallel.collectives import gather_objects
from megazero.parallel.topology import AxisGroup

KIND = "engine"
"""What state.json says of these checkpoints, to tell them from those of a pretraining run."""


@dataclass(frozen=True)
class Wanted:
    """What to take from a checkpoint."""

    strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    module_only: bool = False


def save(
    engine: Parts,
    directory: str | os.PathLike[str],
    tag: str | None,
    client_state: Mapping[str, Any],
    latest: bool,
    exclude_frozen: bool,
) -> None:
    """Write a checkpoint. Collective. See Engine.save_checkpoint."""
    world = engine.topology.group("world")
    task = Together(world, f"saving in {directory}", "Give a folder that every rank can write to")
    name = tag or f"global_step{engine.accumulation.global_steps}"
    tags = task.all(lambda: (name, key_of(name), encode(dict(client_state), "client_state"))[:2])
    if len({given for given, _ in tags}) > 1:
        raise CheckpointError(
            f"ranks save under different tags: {', '.join(sorted({given for given, _ in tags}))}. Give the same on all."
        )
    sections: dict[str, list[Piece]] = {}
    task.all(lambda: sections.update(engine.pieces(for_save=True)))
    more = whole.others(engine.module, engine.zero, for_save=True)
    kept = more["buffers"] + ([] if exclude_frozen else more["frozen"])
    sections["weights"] += [Piece(*piece) for piece in kept]
    excluded = gather_objects([name for name, *_ in more["frozen"]] if exclude_frozen else [], world)
    state = {
        "kind": KIND,
        "counters": engine.accumulation.state(),
        "scaler": None if engine.scaler is None else engine.scaler.state(),
        "scheduler": _scheduler_state(engine.lr_scheduler),
        "optimizer": _optimizer_state(engine, world),
        "data": engine.feed.loader.state() if hasattr(engine.feed.loader, "state") else None,
        "random": gather_objects(encode(_random_state(), "random states"), world),
        "excluded": sorted({name for names in excluded for name in names}),
        "client": encode(dict(client_state), "client_state"),
    }
    save_sections(directory, tags[0][1], sections, state, to_yaml(engine.settings), world, latest=latest)


def load(
    engine: Parts, directory: str | os.PathLike[str], tag: str | None, wanted: Wanted, *, if_exists: bool
) -> tuple[str | None, dict[str, Any]]:
    """Take up a checkpoint. Collective. See Engine.load_checkpoint."""
    store, world = Path(directory), engine.topology.group("world")
    task = Together(world, f"loading from {store}", "Every rank must be able to read the folder")
    key = task.first(lambda: _key(store, tag, if_exists))
    if key is None:
        return None, {}
    state = task.first(lambda: _state(store, key))
    trains = engine.shards is not None and wanted.optimizer and not wanted.module_only
    if trains:
        _prepare_optimizer(engine, state["optimizer"], store / str(key))
    wants = engine.pieces(for_save=False)
    if not trains:
        wants.pop("optimizer", None)
    absent = set(state["excluded"])
    for pieces in whole.others(engine.module, engine.zero, for_save=False).values():
        wants["weights"] += [Piece(*piece) for piece in pieces if piece[0] not in absent]
    load_sections(store, key, wants, world, strict=wanted.strict)
    engine.loaded()
    if not wanted.module_only:
        _take_up(engine, state, wanted, world.rank)
    engine.zero.discard()  # gradients of the weights that were there before
    engine.accumulation.restart()
    return str(step_folder(store, key)), decode(state["client"])


def save_weights(engine: Any, directory: str | os.PathLike[str], filename: str, exclude_frozen: bool) -> bool:
    """Write the whole model in the weights' type with torch.save. Collective."""
    state = engine.consolidated_state_dict(exclude_frozen_parameters=exclude_frozen)
    world = engine.topology.group("world")
    task = Together(world, f"saving {filename} in {directory}", "Give a folder that rank 0 can write to, with room")

    def write() -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{filename}.saving"
        torch.save(state, beside)
        beside.replace(folder / filename)

    task.first(write)
    return True


# what is in state.json


def _optimizer_state(engine: Parts, world: AxisGroup) -> dict[str, Any] | None:
    if engine.shards is None or engine.optimizer is None:
        return None
    return {
        **record(engine.shards, world),
        "groups": [encode(settings_of(group), "param_groups") for group in engine.optimizer.param_groups],
    }


def _prepare_optimizer(engine: Parts, stored: dict[str, Any] | None, path: Path) -> None:
    """Make room for the stored states, and take the hyper-parameters."""
    assert engine.shards is not None and engine.optimizer is not None
    if stored is None:
        raise CheckpointError(
            f"{path} was saved by an engine without an optimizer. Load it with load_optimizer_states=False."
        )
    settings = [decode(group) for group in stored["groups"]]
    check_fits(engine.shards.optimizer, stored, settings, path)
    load_settings(engine.optimizer.param_groups, settings)
    make_room(engine.shards, stored)


def _scheduler_state(scheduler: Any) -> Any:
    state: dict[str, Any] = scheduler.state_dict() if hasattr(scheduler, "state_dict") else {}
    return encode({k: v for k, v in state.items() if not k.startswith("_get_lr")}, "the scheduler's state_dict()")


def _take_up(engine: Parts, state: dict[str, Any], wanted: Wanted, rank: int) -> None:
    """Everything but tensors of the model."""
    engine.accumulation.load(state["counters"])
    if engine.scaler is not None and state["scaler"] is not None:
        engine.scaler.load(state["scaler"])
    stored = decode(state["scheduler"])
    if wanted.scheduler and stored and hasattr(engine.lr_scheduler, "load_state_dict"):
        engine.lr_scheduler.load_state_dict(stored)
    if state["data"] is not None and hasattr(engine.feed.loader, "load"):
        engine.feed.loader.load(state["data"])
        engine.feed.iterator = None
    if len(state["random"]) == engine.topology.world_size:  # another number of ranks has no states to take
        _set_random_state(decode(state["random"][rank]))


def _random_state() -> dict[str, Any]:
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# finding it


def _key(store: Path, tag: str | None, if_exists: bool) -> Key | None:
    """Which checkpoint to load; None only with `if_exists`, when there is none."""
    if tag is not None:
        key = key_of(tag)
        if if_exists and not (store / tag).exists():
            return None
        step_folder(store, key)
        return key
    latest = latest_key(store)
    if latest is None and not if_exists:
        there = "holds no checkpoint" if store.exists() else "does not exist"
        raise CheckpointError(
            f"{store} {there}. Give the folder that save_checkpoint() was given; for a first start, when there is none "
            "yet, if_exists=True returns (None, {})."
        )
    return latest


def _state(store: Path, key: Key) -> dict[str, Any]:
    state = read_state(store, key)
    if state.get("kind") != KIND:
        raise CheckpointError(
            f"{step_folder(store, key)} was saved by pretrain_gpt.py, not by engine.save_checkpoint(). Go on from it "
            "with pretrain_gpt.py --load."
        )
    return state
