"""The schema as a flat table: one `Field` a setting, found by its recipe key (`model.num_layers`).

Everything that treats settings alike (flags, recipes, ranges, origins) walks this table instead of the dataclasses, so
a new field in schema.py is at once a flag, a recipe key and a line of --help.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import typing
from dataclasses import dataclass
from typing import Any

from megazero.config import schema
from megazero.config.schema import RunConfig

SECTIONS: dict[str, type[Any]] = {
    name: hint
    for name, hint in typing.get_type_hints(RunConfig).items()
    if isinstance(hint, type) and name != "origins"
}
"""Section name in recipes -> its dataclass, in the schema's order."""


@dataclass(frozen=True)
class Field:
    """One setting of the schema."""

    section: str
    name: str
    kind: Any
    """The resolved type hint, e.g. `int | None`."""
    default: Any

    @property
    def key(self) -> str:
        """The recipe key, e.g. `model.num_layers`."""
        return f"{self.section}.{self.name}"

    @property
    def is_switch(self) -> bool:
        """Its flag takes no value, and has an opposite: --x and --no-x."""
        return self.kind in (bool, bool | None)

    @property
    def flag(self) -> str:
        """The flag, e.g. `--num-layers`."""
        return flag_of(self.name)


def flag_of(key: str) -> str:
    """The flag of a recipe key: `model.num_layers` -> `--num-layers`."""
    return "--" + key.rpartition(".")[2].replace("_", "-")


def _fields() -> dict[str, Field]:
    table: dict[str, Field] = {}
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            field = Field(section, item.name, hints[item.name], item.default)
            table[field.key] = field
    return table


FIELDS: dict[str, Field] = _fields()
"""Recipe key -> field, in the schema's order. Field names are unique over all sections (flags have no section)."""


def section_of(name: str) -> str | None:
    """The section that has a field of this name, or None."""
    return next((field.section for field in FIELDS.values() if field.name == name), None)


@functools.cache
def docstrings() -> dict[str, str]:
    """Recipe key -> the text under that field in schema.py; and section name -> its dataclass's docstring."""
    section_by_class = {cls.__name__: section for section, cls in SECTIONS.items()}
    texts: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        section = section_by_class.get(node.name) if isinstance(node, ast.ClassDef) else None
        if section is None or not isinstance(node, ast.ClassDef):
            continue
        texts[section] = ast.get_docstring(node) or ""
        for line, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
                texts[f"{section}.{line.target.id}"] = inspect.cleandoc(ast.literal_eval(below.value))
    return texts


def value_of(config: RunConfig, key: str) -> Any:
    """The value of one recipe key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
