"""A ds_config as a tree of values, from what users give: a file, a mapping, or base64 text (urlsafe, of JSON).

JSON as RFC 8259 has it, in UTF-8; a key given twice is an error instead of the last one winning.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megazero.base.errors import ConfigError

Source = str | os.PathLike[str] | Mapping[str, Any]


def read_tree(source: Source) -> tuple[Mapping[str, Any], str]:
    """The tree and what to call it in messages: the file's name, or `config`.

    Raises ConfigError when there is no such file, or when it does not hold one JSON object.
    """
    if isinstance(source, Mapping):
        return source, "config"
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"a DeepSpeed configuration is a file's path, a dict or base64 text, not a {type(source).__name__}. "
            f"Give one of these."
        )
    path = _expanded(Path(source))
    if _is_file(path):
        return _parse(_text(path), path.name), path.name
    text = _from_base64(str(source))
    if text is None and _is_folder(path):
        raise ConfigError(f"{path} is a folder. Give the path of the JSON file in it.")
    if text is None:
        raise ConfigError(
            f"{_shortened(str(source))}: no such file, and not base64 of a JSON object either. Check the path."
        )
    return _parse(text, "config"), "config"


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~nobody
        return path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a long base64 text is no name that a file can have
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); a ds_config is a JSON file.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def _from_base64(text: str) -> str | None:
    """The text inside, when it is base64 of something that begins like a JSON object."""
    try:
        inside = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return inside if inside.lstrip().startswith("{") else None


def _parse(text: str, label: str) -> Mapping[str, Any]:
    try:
        tree = json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{label} line {error.lineno} column {error.colno}: not valid JSON: {error.msg}.{_cause(text, error.pos)}"
        ) from error
    except _TwiceError as error:
        raise ConfigError(f"{label}: the key {error} is given twice in one object. Remove one.") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{label}: a DeepSpeed configuration is one JSON object {{…}}, not {_shortened(repr(tree))}.")
    return tree


def _cause(text: str, position: int) -> str:
    """What JSON has not and HJSON, which DeepSpeed reads, has; else that the line is wrong."""
    rest, before = text[position:].lstrip(), text[:position].rstrip()
    if rest.startswith(("//", "#", "/*")):
        return " JSON has no comments: remove them."
    if re.match(r",\s*[}\]]", rest) or (rest.startswith(("}", "]")) and before.endswith(",")):
        return " Remove the comma before the closing bracket."
    return " Correct that line."


class _TwiceError(ValueError):
    """A key stands twice in one object."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(repr(key))
        found[key] = value
    return found


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
