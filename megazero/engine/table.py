"""tensors.json of a section: which logical tensors it holds, and in which file each of their boxes is.

{"files": ["9f86d0…a08.safetensors"],
 "tensors": {"norm.weight": {"dtype": "float32", "shape": [64], "boxes": [
     {"offset": [0], "shape": [64], "file": 0, "start": 744}]}}}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megazero.base.errors import CheckpointError

TABLE = "tensors.json"
DTYPES = {  # torch's name in the table -> safetensors' name in the payload
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class StoredBox:
    """Where a box is: `start` is its first byte in `file`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor in the table."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]


Table = dict[str, StoredTensor]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32". Raises CheckpointError for a dtype that cannot be stored."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"cannot save {name}: a checkpoint holds {', '.join(DTYPES)}. Convert the tensor first")
    return name


def read_table(folder: Path) -> Table:
    """The tensors of a section by name. The file has been checked against the manifest before."""
    content = json.loads((folder / TABLE).read_bytes())
    files = content["files"]
    return {
        name: StoredTensor(
            getattr(torch, entry["dtype"]),
            tuple(entry["shape"]),
            tuple(
                StoredBox(tuple(box["offset"]), tuple(box["shape"]), files[box["file"]], box["start"])
                for box in entry["boxes"]
            ),
        )
        for name, entry in content["tensors"].items()
    }


def table_bytes(table: Table) -> bytes:
    """tensors.json: one line a tensor, files by number."""
    files = sorted({box.file for entry in table.values() for box in entry.boxes})
    number = {file: i for i, file in enumerate(files)}
    lines = []
    for name, entry in table.items():
        boxes = [asdict(box) | {"file": number[box.file]} for box in entry.boxes]
        value = {"dtype": dtype_name(entry.dtype), "shape": entry.shape, "boxes": boxes}
        lines.append(f"{json.dumps(name)}: {json.dumps(value)}")
    entries = ",\n".join(lines)
    return f'{{"files": {json.dumps(files, indent=1)},\n"tensors": {{\n{entries}\n}}}}\n'.encode()
