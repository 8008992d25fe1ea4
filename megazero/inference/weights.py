"""Filling a model from files of whole tensors: safetensors, torch.save, one file or several, a folder of them.

checkpoint ─► files, one after the other ─► module.load_state_dict, which cuts each tensor for its ranks
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megazero.base.errors import CheckpointError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FILES = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("module", "model", "state_dict")
"""Keys under which programs save a state dict beside other things."""

Checkpoint = str | os.PathLike[str] | Mapping[str, Any]


def load_weights(module: nn.Module, checkpoint: Checkpoint, base_dir: str | os.PathLike[str] | None = None) -> None:
    """Fill all parameters and persistent buffers. Collective, where the module's state dict is.

    Args:
        checkpoint: a file (.safetensors, or of torch.save), a folder as Hugging Face writes it, a JSON file or dict
            {"checkpoints": [files]}, or a state dict.
        base_dir: what the files' names are relative to.

    Raises CheckpointError when there is none, it cannot be read, or its tensors are not the model's.
    """
    wanted = _names(module)
    met: set[str] = set()
    strange: dict[str, None] = {}
    for where, state in _parts(checkpoint, Path(base_dir) if base_dir is not None else None):
        wrong = [name for name, value in state.items() if name in wanted and tuple(value.shape) != wanted[name][1]]
        if wrong:
            raise CheckpointError(
                f"{where}: {wrong[0]} has shape {tuple(state[wrong[0]].shape)}, in the model {wanted[wrong[0]][1]}. "
                "Build the model from the checkpoint's own configuration."
            )
        strange.update(dict.fromkeys(name for name in state if name not in wanted))
        met |= state.keys() & wanted.keys()
        module.load_state_dict(state, strict=False)
    filled = {wanted[name][0] for name in met}
    missing = [name for name, (tensor, _) in wanted.items() if tensor not in filled]
    if missing or strange:
        both = [f"lacks {_some(missing)}"] if missing else []
        both += [f"has {_some(list(strange))} that the model has not"] if strange else []
        raise CheckpointError(
            f"the checkpoint {' and '.join(both)}. Give the weights of this very model, under its own names "
            "(model.state_dict(), engine.save_16bit_model)."
        )


def _names(module: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Key of the state dict -> (the tensor behind it, shared ones the same; its whole shape)."""
    found: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for path, holder in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in holder._parameters.items():
            if parameter is not None:
                spec = getattr(parameter, "shard_spec", None)
                found[prefix + name] = parameter, tuple(parameter.shape if spec is None else spec.shape)
        for name, buffer in holder._buffers.items():
            if buffer is not None and name not in holder._non_persistent_buffers_set:
                found[prefix + name] = buffer, tuple(buffer.shape)
    return found


def _parts(checkpoint: Checkpoint, base: Path | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What it holds, a file at a time: (name for messages, state dict)."""
    if isinstance(checkpoint, Mapping) and "checkpoints" not in checkpoint:
        yield "checkpoint", _state(checkpoint, "checkpoint")
        return
    for path in _files(checkpoint, base):
        yield str(path), _read(path)


def _files(checkpoint: Checkpoint, base: Path | None) -> list[Path]:
    if isinstance(checkpoint, Mapping):
        return _listed(checkpoint, base or Path(), "checkpoint")
    path = (base or Path()) / checkpoint
    if path.is_dir():
        if (path / "MANIFEST.json").exists() or (path / "latest").exists():
            raise CheckpointError(
                f"{path} is a checkpoint of a training, not of weights alone. Write these with "
                "engine.save_16bit_model()."
            )
        for name in INDEXES:
            if (path / name).exists():
                files = json.loads((path / name).read_text())["weight_map"].values()
                return [path / file for file in dict.fromkeys(files)]
        for name in FILES:
            if (path / name).exists():
                return [path / name]
        raise CheckpointError(f"{path} holds no weights: none of {', '.join([*FILES, *INDEXES])} is in it.")
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist. Give a file or a folder of this machine.")
    if path.suffix == ".json":
        try:
            listed = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
        return _listed(listed, base or path.parent, str(path))
    return [path]


def _listed(tree: Any, base: Path, where: str) -> list[Path]:
    files = tree.get("checkpoints") if isinstance(tree, Mapping) else None
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise CheckpointError(f'{where} does not list its files. Write {{"checkpoints": ["weights.safetensors", …]}}.')
    paths = [base / file for file in files]
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise CheckpointError(
            f"{where} lists {absent[0]}, which does not exist. Give base_dir, the folder of its files."
        )
    return paths


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Nothing in it is executed."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file, or damaged: {error}.") from error
    try:
        return _state(torch.load(path, map_location="cpu", weights_only=True, mmap=True), str(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read as weights alone ({first}). Save model.state_dict() with torch.save, or as "
            "safetensors."
        ) from error


def _state(found: Any, where: str) -> dict[str, Tensor]:
    """The state dict in what was saved."""
    inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), found) if found else found
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        raise CheckpointError(f"{where} is not a state dict: names and tensors. Save model.state_dict().")
    return dict(inner)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
