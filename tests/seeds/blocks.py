"""The code blocks of the three documents that megazero is held to, and how tests run them.

blocks/*.md have the texts word for word; table.py says what each test changes in them and why.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megazero.integrations import deepspeed as alias
from megazero.integrations import deepspeed_checkpointing
from tests.seeds.table import ROWS

FOLDER = Path(__file__).parent / "blocks"


class Block(NamedTuple):
    language: str
    text: str


def blocks() -> dict[str, Block]:
    """All blocks by name, in the documents' order."""
    found = {}
    for path in sorted(FOLDER.glob("*.md")):
        for name, language, text in re.findall(r"^## (.*?)\n\n```(\w+)\n(.*?)\n```$", path.read_text(), re.M | re.S):
            found[name] = Block(language, text)
    return found


def code(name: str) -> str:
    """The text of a block with the changes that the table names, each of which must apply."""
    text = blocks()[name].text
    for change in ROWS[name].changes:
        assert change.old in text, f"{name}: {change.old!r} is not in the block"
        text = text.replace(change.old, change.new)
    return text


def settings(name: str) -> dict[str, Any]:
    """A JSON block as a dict, with its changes and additions."""
    return json.loads(code(name)) | ROWS[name].added


def run(name: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute a Python block among these names, to which it adds its own."""
    exec(compile(code(name), f"<{name}>", "exec"), names)
    return names


@contextmanager
def place(folder: str, **files: dict[str, Any]) -> Iterator[None]:
    """Inside: the alias is installed and the working directory is this folder, with JSON files of these names."""
    before = os.getcwd()
    alias.install()
    try:
        os.chdir(folder)
        for name, content in files.items():  # every rank writes the same: whole, then in place
            part = Path(f"{name}.{os.getpid()}")
            part.write_text(json.dumps(content))
            part.rename(f"{name}.json")
        yield
    finally:
        os.chdir(before)
        alias.uninstall()
        deepspeed_checkpointing.State.configured = False
        deepspeed_checkpointing.State.saved = None
