"""Recipes: YAML files of settings, one mapping a section, with an optional `base:` to inherit from.

    base: llama3.2_1b.yaml          looked up beside this file, then in recipes/
    training:
      train_iters: 1000

`read_recipe` gives the layers (base first), `to_yaml` writes a run's settings back as a recipe.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megazero.base.errors import ConfigError
from megazero.config.decode import DecodeError, decode, did_you_mean
from megazero.config.fields import FIELDS, SECTIONS, section_of, value_of
from megazero.config.layers import Layer, Setting
from megazero.config.megatron import explain, explain_alias
from megazero.config.schema import RunConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
"""The checkout's recipes."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    twice = f"the key {key.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(name: str) -> list[Layer]:
    """The layers of a recipe, its bases first.

    `name` is a path, or the name of a file in the checkout's recipes/. Raises ConfigError naming the file and every
    key that is unknown or has a wrong type, and for a missing or circular base.
    """
    return _read_chain(_find(name, [Path(), RECIPES], "--recipe"), ())


def parse_recipe(text: str, label: str) -> tuple[str | None, Layer]:
    """One recipe's `base:` (or None) and its settings. `label` names the file in messages and origins."""
    tree = _load_yaml(text, label)
    if not isinstance(tree, dict):
        found = "it is empty" if tree is None else f"it is a {type(tree).__name__}"
        raise ConfigError(f"{label}: a recipe is a mapping of sections ({', '.join(SECTIONS)}), but {found}.")
    base = tree.pop("base", None)
    problems: list[str] = []
    if base is not None and not isinstance(base, str):
        problems.append(f"{label}: base: expected the name of one recipe, got {base!r}.")
    layer: dict[str, Setting] = {}
    for section, values in tree.items():
        for key, value in _entries(section, values, label, problems):
            try:
                layer[key] = Setting(decode(value, FIELDS[key].kind), label)
            except DecodeError as error:
                problems.append(f"{label}: {key}: {error}")
    if problems:
        raise ConfigError(*problems)
    return base, layer


def to_yaml(config: RunConfig) -> str:
    """The settings as a recipe, each with its origin in a comment.

    Derived values are comment lines: a run that starts from this file with another --output-dir or --hidden-size
    derives them anew instead of writing into the old run's folder.
    """
    lines = ["# Every setting and where it came from. This file is a recipe too: --recipe FILE."]
    for section in SECTIONS:
        lines += ["", f"{section}:"]
        for field in (field for field in FIELDS.values() if field.section == section):
            value = value_of(config, field.key)
            origin = config.origins.get(field.key, "default" if value == field.default else "set by the program")
            mark = "# " if origin.startswith("derived") else ""
            lines.append(f"  {mark}{field.name}: {_scalar(value)}  # {' '.join(origin.split())}")
    return "\n".join(lines) + "\n"


def resolved_values(text: str, label: str) -> dict[str, Any]:
    """Every value in what `to_yaml` wrote, derived ones too, by recipe key. Raises ConfigError when it is no mapping of
    sections."""
    tree = _load_yaml(re.sub(r"^  # (?=\w+: )", "  ", text, flags=re.MULTILINE), label)
    if not isinstance(tree, dict) or not all(isinstance(values, dict) for values in tree.values()):
        raise ConfigError(f"{label} is not the config.yaml of a run: it should be a mapping of sections. Remove it.")
    return {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}


def _read_chain(path: Path, children: tuple[Path, ...]) -> list[Layer]:
    label = _label(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label} is not UTF-8 text (byte {error.start}); a recipe is a YAML text file.") from error
    except OSError as error:
        raise ConfigError(f"{label} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    base, layer = parse_recipe(text, label)
    if base is None:
        return [layer]
    chain = (*children, path.resolve())
    parent = _find(base, [path.parent, RECIPES], f"{label}: base:")
    if parent.resolve() in chain:
        circle = " -> ".join(_label(member) for member in (*chain, parent))
        raise ConfigError(f"{label}: base: {base} closes a circle ({circle}); remove one of these base: lines.")
    return [*_read_chain(parent, chain), layer]


def _find(name: str, folders: list[Path], asked_by: str) -> Path:
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is not None:
        return path
    known = sorted(recipe.name for recipe in RECIPES.glob("*.yaml"))
    places = " and ".join(dict.fromkeys(_label(folder / name) for folder in folders))
    raise ConfigError(
        f"{asked_by} {name}: no such file (looked at {places}).{did_you_mean(Path(name).name, known)} "
        f"recipes/ has {', '.join(known) or 'nothing'}."
    )


def _label(path: Path) -> str:
    """How a recipe is called in messages and origins: `recipes/x.yaml` in the checkout, else the path as given."""
    resolved = path.resolve()
    if resolved.is_relative_to(RECIPES):
        return (Path("recipes") / resolved.relative_to(RECIPES)).as_posix()
    working = Path(os.curdir).resolve()
    return (resolved.relative_to(working) if resolved.is_relative_to(working) else path).as_posix()


def _load_yaml(text: str, label: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label} line {mark.line + 1}" if mark else label
        lines = text.splitlines()
        if mark and mark.line < len(lines) and re.match(r"\s*\t", lines[mark.line]):
            raise ConfigError(f"{where}: a tab; YAML is indented with spaces. Replace the tab by spaces.") from error
        problem = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", error)).split())
        raise ConfigError(f"{where}: not valid YAML: {problem}. Correct that line.") from error


def _entries(section: object, values: object, label: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    """The known keys of one section of the file; what is unknown becomes a problem."""
    if section not in SECTIONS:
        problems.append(f"{label}: {_unknown_section(str(section))}")
    elif not isinstance(values, dict) and values is not None:  # a section may be there with every line commented out
        problems.append(f"{label}: {section}: expected `key: value` lines, got {values!r}.")
    else:
        for name, value in (values or {}).items():
            key = f"{section}.{name}"
            if key in FIELDS:
                yield key, value
            else:
                problems.append(f"{label}: {_unknown_key(str(section), str(name))}")


def _unknown_section(name: str) -> str:
    home = section_of(name.replace("-", "_"))
    if home:
        return f"{name!r} stands outside its section; write it under `{home}:`."
    return f"unknown section {name!r}.{did_you_mean(name, SECTIONS)} There are {', '.join(SECTIONS)}."


def _unknown_key(section: str, name: str) -> str:
    home = section_of(name)
    if home:
        return f"unknown key {name!r} in `{section}`; it belongs under `{home}:`."
    flag = "--" + name.replace("_", "-")
    reason = explain(flag) or explain_alias(flag)
    if reason:
        return f"unknown key {name!r} in `{section}`: {reason}"
    names = [field.name for field in FIELDS.values() if field.section == section]
    hint = did_you_mean(name, names)
    if not hint:
        hint = did_you_mean(name, [field.key for field in FIELDS.values()])
    return f"unknown key {name!r} in `{section}`.{hint}"


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    quoted = isinstance(value, str) and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", value)
    text: str = yaml.safe_dump(value, default_style='"' if quoted else None, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
