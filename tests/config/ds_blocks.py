"""The configurations that ds_blocks.txt holds, by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TEXT = (Path(__file__).parent / "ds_blocks.txt").read_text(encoding="utf-8")
BLOCKS: dict[str, Any] = {
    name: json.loads(body) for name, body in re.findall(r"(?ms)^== (\w+)\n(.*?)(?=^== |\Z)", TEXT)
}


def paths(tree: dict[str, Any], start: str = "") -> list[str]:
    """The path of every key that is no section."""
    found: list[str] = []
    for key, value in tree.items():
        found += paths(value, f"{start}{key}.") if isinstance(value, dict) else [f"{start}{key}"]
    return found
