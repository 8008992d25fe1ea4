"""The folder of a run's checkpoints: which steps it holds, which is the latest, how one appears and disappears.

    latest                     names the step to resume from; replaced atomically, after all else
    step_00000500/ …           whole checkpoints, each with a manifest
    global_step10/ …           others, whose names ("tags") a script chose
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
from collections.abc import Sequence
from pathlib import Path

from megazero.base.errors import CheckpointError
from megazero.engine.manifest import MANIFEST, sync_folder, write_file

LATEST = "latest"
_PENDING = ".latest"
_STEP = re.compile(r"step_(\d{8,})")
_TAG = re.compile(r"[A-Za-z0-9_\-+=][A-Za-z0-9_.\-+=]*")
_SAVING, _REPLACED, _DELETING = ".saving_", ".replaced_", ".deleting_"


Key = int | str
"""Which checkpoint: the iteration of a run's own, or the tag that a script gave."""


def step_name(key: Key) -> str:
    """The name of a checkpoint's folder."""
    return key if isinstance(key, str) else f"step_{key:08d}"


def key_of(tag: str) -> Key:
    """The key that a script means by this tag. Raises CheckpointError for one that cannot be a folder's name."""
    if (match := _STEP.fullmatch(tag)) and step_name(int(match[1])) == tag:
        return int(match[1])
    if not _TAG.fullmatch(tag) or tag == LATEST:
        raise CheckpointError(
            f"tag {tag!r} cannot name a checkpoint's folder: it has letters, digits and . _ - + = only, does not begin "
            f"with a dot, and is not {LATEST!r}. Choose another, such as 'global_step10'"
        )
    return tag


def saving_folder(store: Path, key: Key) -> Path:
    """Where a checkpoint is written before `publish` gives it its name."""
    return store / (_SAVING + step_name(key))


def usable_steps(store: Path) -> list[int]:
    """Iterations of the whole checkpoints in the folder that a run made, ascending; none when there is no such folder.

    Raises CheckpointError when it cannot be listed or is itself a checkpoint.
    """
    return [key for key in usable_keys(store) if isinstance(key, int)]


def usable_keys(store: Path) -> list[Key]:
    """The whole checkpoints in the folder: iterations, ascending, then tags, oldest first. Raises as `usable_steps`."""
    try:
        whole = [entry for entry in store.iterdir() if (entry / MANIFEST).is_file()]
        made = {entry.name.removeprefix(_REPLACED): (entry / MANIFEST).stat().st_mtime for entry in whole}
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
    keys = [_parsed(name.encode()) for name in made]
    tags = sorted((key for key in keys if isinstance(key, str)), key=lambda tag: (made[tag], tag))
    return [*sorted(key for key in keys if isinstance(key, int)), *tags]


def remedy(keys: Sequence[Key]) -> str:
    """What a user can do about a checkpoint that is not there or not sound, given those that are."""
    tags = [key for key in keys if isinstance(key, str)]
    if tags:
        return f"Usable tags here: {', '.join(map(step_name, keys))}; choose one with tag=…"
    if keys:
        return f"Usable steps here: {', '.join(map(str, keys))}; choose one with --ckpt-step"
    return (
        "No other step here is usable: give another folder with --load, or remove this one to start from the beginning"
    )


def step_folder(store: Path, key: Key) -> Path:
    """The folder of a whole checkpoint. Raises CheckpointError, naming the usable ones, when there is none."""
    name = step_name(key)
    for folder in (store / name, store / (_REPLACED + name)):  # the second: a save of the same step was killed
        if (folder / MANIFEST).is_file():
            return folder
    what = f"iteration {key}" if isinstance(key, int) else f"tag {key}"
    raise CheckpointError(f"{store} holds no whole checkpoint of {what}. {remedy(usable_keys(store))}")


def latest_iteration(directory: str | os.PathLike[str]) -> int | None:
    """The iteration that `latest` names; None only when the folder holds no checkpoint (or is not there).

    Raises CheckpointError when `latest` is missing beside checkpoints, is damaged, or names a step that is not there,
    or one that a script saved under a tag.
    """
    key = latest_key(directory)
    if isinstance(key, str):
        raise CheckpointError(
            f"{directory} holds the checkpoint {key}, which a script saved with engine.save_checkpoint(); a run of "
            "pretrain_gpt.py cannot go on from it. Give another folder"
        )
    return key


def latest_key(directory: str | os.PathLike[str]) -> Key | None:
    """The checkpoint that `latest` names, whoever made it; otherwise as `latest_iteration`."""
    store = Path(directory)
    keys = usable_keys(store)
    text = _read(store / LATEST)
    if text is None:
        pending = _pending(store)
        if pending in keys:  # the first save was killed between its last two renames
            return pending
        if not keys:
            return None
        raise CheckpointError(f"{store / LATEST} is missing, though there are checkpoints. {remedy(keys)}")
    named = _parsed(text)
    if named is None or (isinstance(named, str) and named not in keys):
        raise CheckpointError(
            f"{store / LATEST} is damaged: it reads {text[:40]!r}, which names no checkpoint here. {remedy(keys)}"
        )
    if named not in keys:
        raise CheckpointError(f"{store / LATEST} names iteration {named}, which is not there. {remedy(keys)}")
    return named


def begin(store: Path, key: Key) -> None:
    """Clear what killed runs left and make the empty folder to write into. Raises OSError."""
    store.mkdir(parents=True, exist_ok=True)
    _settle(store)
    saving_folder(store, key).mkdir()


def publish(store: Path, key: Key, *, latest: bool = True) -> None:
    """Give the written checkpoint its name, replacing one of that name, then point `latest` at it. Raises OSError.

    `latest` False leaves that pointing where it does.
    """
    name, saving = step_name(key), saving_folder(store, key)
    sync_folder(saving)
    if latest:
        write_file(store / _PENDING, f"{name}\n".encode())
    if (store / name).exists():
        (store / name).rename(store / (_REPLACED + name))
    saving.rename(store / name)
    sync_folder(store)
    if latest:
        (store / _PENDING).replace(store / LATEST)
        sync_folder(store)
    shutil.rmtree(store / (_REPLACED + name), ignore_errors=True)  # what is left of it goes with the next save


def discard(store: Path, key: Key) -> None:
    """Remove a checkpoint that could not be finished."""
    shutil.rmtree(saving_folder(store, key), ignore_errors=True)  # the error that led here is the one to show


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
    if not (store / LATEST).exists() and _pending(store) in usable_keys(store):
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


def _parsed(text: bytes) -> Key | None:
    """The checkpoint in the content of `latest`, None if it is not the name of one."""
    name = text.decode("ascii", errors="replace").strip()
    if match := _STEP.fullmatch(name):
        return int(match[1])
    return name if _TAG.fullmatch(name) else None


def _pending(store: Path) -> Key | None:
    """What `latest` was about to become; None if that is not known, as when a save was killed while it wrote it."""
    return _parsed(_read(store / _PENDING) or b"")
