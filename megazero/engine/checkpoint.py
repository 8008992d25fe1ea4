"""Saving and loading a run: any layout and ZeRO stage loads what any other saved.

    step_00001000/ { weights/  optimizer/  config.yaml  state.json  MANIFEST.json }   latest

Each section (weights/, optimizer/) holds boxes of logical tensors (storage.py) written by all ranks together. A
checkpoint appears whole or not at all (steps.py), and is checked against its manifest before a byte of it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megazero.base.errors import CheckpointError
from megazero.engine.boxed import BoxedTensor, Piece, boxed_state
from megazero.engine.manifest import (
    FileRecord,
    read_manifest,
    sync_folder,
    to_json,
    verify_file,
    write_file,
    write_manifest,
)
from megazero.engine.steps import (
    Key,
    begin,
    discard,
    latest_iteration,
    latest_key,
    publish,
    remedy,
    retain,
    saving_folder,
    step_folder,
    usable_keys,
    usable_steps,
)
from megazero.engine.storage import SectionReader, SectionWriter
from megazero.engine.table import Table, read_table
from megazero.engine.together import Together
from megazero.parallel.topology import AxisGroup

__all__ = [
    "Key",
    "Piece",
    "latest_iteration",
    "latest_key",
    "load",
    "open_section",
    "read_state",
    "retain",
    "save",
    "usable_keys",
    "usable_steps",
]

STATE, CONFIG = "state.json", "config.yaml"
_VERIFY_THREADS = 4
_SHOWN = 5  # differences to another model that an error lists

Kind = tuple[tuple[int, ...], torch.dtype]


def save(
    directory: str | os.PathLike[str],
    iteration: Key,
    sections: Mapping[str, Sequence[Piece]],
    state: Mapping[str, Any],
    config_yaml: str,
    group: AxisGroup,
    *,
    latest: bool = True,
) -> None:
    """Save a checkpoint of all ranks of `group` and make it the latest (unless `latest` is False). Collective.

    Args:
        directory: folder of checkpoints, on storage that every rank sees; made if missing.
        iteration: steps done, or a tag; names the checkpoint and replaces one of the same name.
        sections: e.g. {"weights": …, "optimizer": …}, the same keys on every rank. Each element of a logical tensor
            is in exactly one piece of one rank: ranks with copies leave them out.
        state: JSON values (no tuples, string keys), returned by `load`. The group's first rank's is kept.
        config_yaml: the resolved configuration, kept for people and tools.
        group: with NCCL, each rank must have called torch.cuda.set_device: plans and errors travel through GPU memory.

    Raises CheckpointError on every rank when any rank cannot write; earlier checkpoints are untouched. RuntimeError for
    pieces that do not tile their tensor.
    """
    store = Path(directory)
    folder = saving_folder(store, iteration)
    task = Together(
        group,
        f"saving {'iteration' if isinstance(iteration, int) else 'tag'} {iteration} in {store}",
        "The folder must be on storage that every rank sees, writable and with room: give another with --save. "
        "Earlier checkpoints are untouched",
    )
    states = _boxed(sections, task, iteration)
    try:
        task.first(lambda: _begin(store, iteration, states))
        files: dict[str, FileRecord] = {}
        for section, tensors in states.items():
            writer = SectionWriter(folder / section)
            with task.planned():
                dcp.save(
                    dict(tensors),
                    storage_writer=writer,
                    planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=group.handle,
                    no_dist=group.size == 1,
                )
            files |= {f"{section}/{name}": record for name, record in writer.files.items()}
        task.first(lambda: _finish(store, iteration, files, dict(state), config_yaml, latest))
    except BaseException:
        if group.rank == 0:
            discard(store, iteration)
        raise


def load(
    directory: str | os.PathLike[str],
    iteration: Key | None,
    sections: Mapping[str, Sequence[Piece]],
    group: AxisGroup,
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """Fill the pieces in place from a checkpoint, whatever the layout that saved it; return its state. Collective.

    Args:
        directory: folder of checkpoints.
        iteration: which; None for the one that `latest` names.
        sections: what to load, the same keys on every rank: {"weights": …} alone leaves the optimizer where it is.
            Over all ranks the pieces name every tensor of the section. A rank may take any boxes, also ones that
            other ranks take; floating-point types are converted.
        group: as for `save`.
        strict: False takes what both have, by name, of equal shape, and leaves the rest as it is.

    Raises CheckpointError on every rank when the checkpoint is missing, damaged (each file's checksum is verified
    first, by one rank each) or of another model; then no piece has been touched.
    """
    store = Path(directory)
    task = Together(group, f"loading from {store}", "Every rank must be able to read the folder")
    states = _boxed(sections, task, iteration)
    folder, step, files = task.first(lambda: _find(store, iteration, list(states)))
    mine = sorted(files, key=lambda path: (-files[path].size, path))[group.rank :: group.size]
    task.all(lambda: _verify(store, folder, step, {path: files[path] for path in mine}))
    tables: dict[str, Table] = {}

    def wanted_here() -> dict[str, dict[str, Kind]]:
        tables.update({section: read_table(folder / section) for section in states})
        return {s: {name: (tuple(t.size()), t.dtype) for name, t in tensors.items()} for s, tensors in states.items()}

    wanted = task.all(wanted_here)
    if strict:
        task.first(lambda: _check_same_model(folder, tables, wanted))
    else:
        states = {section: _held(tables[section], tensors) for section, tensors in states.items()}
    for section, tensors in states.items():
        with task.planned():
            dcp.load(
                dict(tensors),
                storage_reader=SectionReader(folder / section, tables[section]),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=group.handle,
                no_dist=group.size == 1,
            )
    state: dict[str, Any] = task.first(lambda: json.loads((folder / STATE).read_bytes()))
    return state


def _boxed(
    sections: Mapping[str, Sequence[Piece]], task: Together, iteration: Key | None
) -> dict[str, dict[str, BoxedTensor]]:
    """The sections' state dicts, in the order that all ranks go through them."""
    states: dict[str, dict[str, BoxedTensor]] = {}

    def build() -> tuple[Key | None, list[str]]:
        states.update({section: boxed_state(sections[section]) for section in sorted(sections)})
        return iteration, list(states)

    calls = task.all(build)
    assert all(call == calls[0] for call in calls), f"ranks save or load different things: {calls}"
    return states


def _begin(store: Path, iteration: Key, sections: Iterable[str]) -> None:
    begin(store, iteration)
    for section in sections:
        (saving_folder(store, iteration) / section).mkdir()


def _finish(
    store: Path,
    iteration: Key,
    payload: dict[str, FileRecord],
    state: dict[str, Any],
    config_yaml: str,
    latest: bool,
) -> None:
    """On the first rank, when all sections are written: the rest, the manifest, and the checkpoint's name."""
    folder = saving_folder(store, iteration)
    for section in {path.split("/")[0] for path in payload}:
        sync_folder(folder / section)
    files = payload | {
        CONFIG: write_file(folder / CONFIG, config_yaml.encode()),
        STATE: write_file(folder / STATE, to_json(state)),
    }
    write_manifest(folder, iteration, files)
    publish(store, iteration, latest=latest)


def read_state(directory: str | os.PathLike[str], iteration: Key | None) -> dict[str, Any]:
    """The state that `save` was given, checked, without the tensors: what one needs to make room for them.

    Not collective. Raises CheckpointError as `load` does.
    """
    store = Path(directory)
    folder, step, files = _find(store, iteration, [])
    _verify(store, folder, step, {STATE: files[STATE]})
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def open_section(directory: str | os.PathLike[str], iteration: Key | None, section: str) -> tuple[Path, Table]:
    """A section's folder and its tensors by name, all of its files checked; storage.read_tensor reads one of them.

    Not collective: for tools. Raises CheckpointError as `load` does.
    """
    store = Path(directory)
    folder, found, files = _find(store, iteration, [section])
    _verify(store, folder, found, files)
    return folder / section, read_table(folder / section)


def _find(store: Path, iteration: Key | None, sections: list[str]) -> tuple[Path, Key, dict[str, FileRecord]]:
    """The checkpoint's folder, its iteration, and the files to be used."""
    if iteration is None:
        iteration = latest_key(store)
    if iteration is None:
        there = "holds no checkpoint" if store.exists() else "does not exist"
        raise CheckpointError(f"checkpoint folder {store} {there}: give --load a folder that a run saved into")
    folder = step_folder(store, iteration)
    try:
        files = read_manifest(folder, iteration)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_other_steps(store, iteration)}") from error
    held = {path.split("/")[0] for path in files if "/" in path}
    for section in sections:
        if section not in held:
            raise CheckpointError(
                f"{folder} holds no {section}, only {', '.join(sorted(held)) or 'no tensors'}: "
                "it was saved without. Take its weights alone with --finetune, or give another --load"
            )
    return folder, iteration, {path: files[path] for path in files if "/" not in path or path.split("/")[0] in sections}


def _verify(store: Path, folder: Path, iteration: Key, files: dict[str, FileRecord]) -> None:
    try:
        with ThreadPoolExecutor(_VERIFY_THREADS) as threads:
            for _ in threads.map(lambda path: verify_file(folder / path, files[path]), files):
                pass
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_other_steps(store, iteration)}") from error


def _other_steps(store: Path, iteration: Key) -> str:
    return remedy([step for step in usable_keys(store) if step != iteration])


def _held(table: Table, tensors: dict[str, BoxedTensor]) -> dict[str, BoxedTensor]:
    """The tensors that are stored in this shape."""
    return {n: tensor for n, tensor in tensors.items() if n in table and table[n].shape == tuple(tensor.size())}


def _check_same_model(folder: Path, tables: dict[str, Table], wanted: list[dict[str, dict[str, Kind]]]) -> None:
    """Raise CheckpointError unless the ranks together want the tensors that are stored, in shape and kind of dtype."""
    differences: list[str] = []
    for section, table in tables.items():
        kinds = {name: kind for of_rank in wanted for name, kind in of_rank[section].items()}
        for name in sorted(kinds | table.keys()):
            if name not in table:
                differences.append(f"{section}: {name} {list(kinds[name][0])} is not in the checkpoint")
            elif name not in kinds:
                differences.append(
                    f"{section}: {name} {list(table[name].shape)} is in the checkpoint, not in the model"
                )
            elif table[name].shape != kinds[name][0]:
                shapes = f"{list(table[name].shape)} in the checkpoint, {list(kinds[name][0])} in the model"
                differences.append(f"{section}: {name} is {shapes}")
            elif (stored := table[name].dtype) != (own := kinds[name][1]) and not (
                stored.is_floating_point and own.is_floating_point
            ):
                differences.append(f"{section}: {name} is {stored} in the checkpoint, {own} in the model")
    if differences:
        more = [f"… and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
        raise CheckpointError(
            "\n  - ".join([f"{folder} is a checkpoint of another model:", *differences[:_SHOWN], *more])
            + f"\nUse the model settings in {folder / CONFIG}, or give another --load"
        )
