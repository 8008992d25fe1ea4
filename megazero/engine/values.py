"""Values of a script's own as JSON and back, with nothing executed on load: what pickle is used for elsewhere.

    (1, "a")          {"~tuple": [1, "a"]}
    {3: 0.5}          {"~items": [[3, 0.5]]}
    tensor([1, 2])    {"~tensor": "int64", "shape": [2], "data": "AQAAAA…"}      base64; numpy arrays and scalars alike

JSON has numbers (NaN and infinity too), text, true, false, null, lists and dicts with text keys by itself.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megazero.base.errors import CheckpointError


def encode(value: Any, where: str) -> Any:
    """The value as JSON has it. Raises CheckpointError for other types, saying `where` it stands."""
    if value is None or (isinstance(value, bool | int | float | str) and type(value).__module__ == "builtins"):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), where)
    if isinstance(value, np.ndarray):
        return {**encode(torch.from_numpy(np.ascontiguousarray(value)), where), "numpy": True}
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = base64.b64encode(flat.numpy().tobytes()).decode("ascii")
        return {"~tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "data": data}
    if isinstance(value, tuple):
        return {"~tuple": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [(key, encode(item, f"{where}[{key!r}]")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("~") for key, _ in items):
            return dict(items)
        return {"~items": [[encode(key, where), item] for key, item in items]}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}: a checkpoint keeps numbers, text, tensors, lists, tuples and dicts of "
        "these, so that loading one executes nothing. Save what it is made of."
    )


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "~tuple" in value:
        return tuple(decode(item) for item in value["~tuple"])
    if "~items" in value:
        return {decode(key): decode(item) for key, item in value["~items"]}
    if "~tensor" in value:
        data = bytearray(base64.b64decode(value["data"]))
        dtype = getattr(torch, value["~tensor"])
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensor = flat.reshape(value["shape"])
        return tensor.numpy() if value.get("numpy") else tensor
    return {key: decode(item) for key, item in value.items()}
