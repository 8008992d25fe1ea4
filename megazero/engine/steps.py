"""The folder of a run's checkpoints: which steps it holds, which is the latest, how one appears and disappears.

    latest                     names the step to resume from; replaced atomically, after all else
    step_00000500/ …           whole checkpoints, each with a manifest
    .saving_step_00001000/     being written
    .replaced_step_00000500/   set aside while a second save of the same step takes its place
    .deleting_step_00000100/   going away
    .latest                    what `latest` is about to become

Readers see whole checkpoints only, whenever a save or a deletion is killed; the next save clears what it left.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megazero.base.errors import CheckpointError
from megazero.engine.manifest import MANIFEST, sync_folder, write_file

LATEST = "latest"
_PENDING = ".latest"
_STEP = re.compile(r"step_(\d{8,})")
_SAVING, _REPLACED, _DELETING = ".saving_", ".replaced_", ".deleting_"


def step_name(iteration: int) -> str:
    return f"step_{iteration:08d}"


def saving_folder(store: Path, iteration: int) -> Path:
    """Where a checkpoint is written before `publish` gives it its name."""
    return store / (_SAVING + step_name(iteration))


def usable_steps(store: Path) -> list[int]:
    """Iterations of the whole checkpoints in the folder, ascending; none when there is no such folder.

    Raises CheckpointError when it cannot be listed or is itself a checkpoint.
    """
    try:
        names = [entry.name.removeprefix(_REPLACED) for entry in store.iterdir() if (entry / MANIFEST).is_file()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint folder {store}: {error.strerror}. Give another with --save or --output-dir "
            "(--load, if it is the one to start from)"
        ) from error
    if (store / MANIFEST).is_file():
        raise CheckpointError(
            f"{store} is one checkpoint, not a folder of checkpoints: give its parent "
            f"{store.absolute().parent}, and the iteration with --ckpt-step"
        )
    return sorted({int(match[1]) for name in names if (match := _STEP.fullmatch(name))})


def remedy(steps: list[int]) -> str:
    """What a user can do about a checkpoint that is not there or not sound, given the steps that are."""
    if steps:
        return f"Usable steps here: {', '.join(map(str, steps))}; choose one with --ckpt-step"
    return (
        "No other step here is usable: give another folder with --load, or remove this one to start from the beginning"
    )


def step_folder(store: Path, iteration: int) -> Path:
    """The folder of a whole checkpoint. Raises CheckpointError, naming the usable steps, when there is none."""
    name = step_name(iteration)
    for folder in (store / name, store / (_REPLACED + name)):  # the second: a save of the same step was killed
        if (folder / MANIFEST).is_file():
            return folder
    raise CheckpointError(f"{store} holds no whole checkpoint of iteration {iteration}. {remedy(usable_steps(store))}")


def latest_iteration(directory: str | os.PathLike[str]) -> int | None:
    """The iteration that `latest` names; None only when the folder holds no checkpoint (or is not there).

    Raises CheckpointError when `latest` is missing beside checkpoints, is damaged, or names a step that is not there.
    """
    store = Path(directory)
    steps = usable_steps(store)
    text = _read(store / LATEST)
    if text is None:
        pending = _pending(store)
        if pending in steps:  # the first save was killed between its last two renames
            return pending
        if not steps:
            return None
        raise CheckpointError(f"{store / LATEST} is missing, though there are checkpoints. {remedy(steps)}")
    named = _parsed(text)
    if named is None:
        raise CheckpointError(f"{store / LATEST} is damaged: it reads {text[:40]!r}. {remedy(steps)}")
    if named not in steps:
        raise CheckpointError(f"{store / LATEST} names iteration {named}, which is not there. {remedy(steps)}")
    return named


def begin(store: Path, iteration: int) -> None:
    """Clear what killed runs left and make the empty folder to write into. Raises OSError."""
    store.mkdir(parents=True, exist_ok=True)
    _settle(store)
    saving_folder(store, iteration).mkdir()


def publish(store: Path, iteration: int) -> None:
    """Give the written checkpoint its name, replacing one of that step, then point `latest` at it. Raises OSError."""
    name, saving = step_name(iteration), saving_folder(store, iteration)
    sync_folder(saving)
    write_file(store / _PENDING, f"{name}\n".encode())
    if (store / name).exists():
        (store / name).rename(store / (_REPLACED + name))
    saving.rename(store / name)
    sync_folder(store)
    (store / _PENDING).replace(store / LATEST)
    sync_folder(store)
    shutil.rmtree(store / (_REPLACED + name), ignore_errors=True)  # what is left of it goes with the next save


def discard(store: Path, iteration: int) -> None:
    """Remove a checkpoint that could not be finished."""
    shutil.rmtree(saving_folder(store, iteration), ignore_errors=True)  # the error that led here is the one to show


def retain(directory: str | os.PathLike[str], keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one that `latest` names. For one rank, after a save.

    Raises CheckpointError when a folder cannot be removed or `latest` is damaged.
    """
    assert keep_last >= 1, f"keep_last={keep_last}"
    store = Path(directory)
    latest = latest_iteration(store)
    for iteration in usable_steps(store)[:-keep_last]:
        if iteration != latest:
            doomed = store / (_DELETING + step_name(iteration))
            try:
                step_folder(store, iteration).rename(doomed)
                sync_folder(store)
                shutil.rmtree(doomed)
            except OSError as error:
                raise CheckpointError(f"cannot delete {doomed}, which --keep-last no longer keeps: {error}") from error


def _settle(store: Path) -> None:
    """Finish or undo what a killed save or deletion left half-way."""
    if not (store / LATEST).exists() and _pending(store) in usable_steps(store):
        (store / _PENDING).replace(store / LATEST)
    for entry in list(store.iterdir()):
        if entry.name.startswith(_REPLACED):
            name = entry.name.removeprefix(_REPLACED)
            if (entry / MANIFEST).is_file() and not (store / name).exists():
                entry.rename(store / name)
                continue
        if entry.name.startswith((_SAVING, _REPLACED, _DELETING)):
            shutil.rmtree(entry)


def _read(path: Path) -> bytes | None:
    """The file's content, None if there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(text: bytes) -> int | None:
    """The iteration in the content of `latest`, None if it is not a step's name."""
    match = _STEP.fullmatch(text.decode("ascii", errors="replace").strip())
    return int(match[1]) if match else None


def _pending(store: Path) -> int | None:
    """What `latest` was about to become; None if that is not known, as when a save was killed while it wrote it."""
    return _parsed(_read(store / _PENDING) or b"")
