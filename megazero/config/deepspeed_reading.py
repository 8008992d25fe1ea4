"""One pass over a ds_config's tree by the table of `deepspeed_keys.py`: settings, a report, and every problem.

    tree -> each key's path, in its modern spelling -> its entry in TABLE -> settings | values kept | report | problem

`"auto"` is taken down with its path; who knows the model or the flags settles it. `null` is a key left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megazero.config.decode import DecodeError, decode, did_you_mean
from megazero.config.deepspeed_keys import (
    ALIASES,
    FOREIGN,
    TABLE,
    Closed,
    Dead,
    Named,
    Off,
    To,
    Value,
    homes,
    section_keys,
)
from megazero.config.deepspeed_report import KeyReport
from megazero.config.fields import FIELDS
from megazero.config.layers import Setting
from megazero.config.ranges import RANGES, remedy_of

AUTO = "auto"


@dataclass
class Reading:
    """What has been found so far."""

    label: str
    settings: dict[str, Setting] = field(default_factory=dict)
    autos: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Path of each "auto" -> the recipe keys that it stands for."""
    values: dict[str, Any] = field(default_factory=dict)
    """Path -> value of the keys that are translated together, "auto" included."""
    named: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """The raw sections `optimizer` and `scheduler`."""
    used: list[tuple[str, str]] = field(default_factory=list)
    translated: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Path -> the path as written and its raw value."""

    def problem(self, path: str, text: str) -> None:
        """`ds_config.json: zero_optimization.stage: <text>`."""
        self.problems.append(f"{self.label}: {path}: {text}")

    def set(self, path: str, key: str, value: Any) -> bool:
        """Let this recipe key have this value, if it is of its type and in its range; else note the problem."""
        try:
            decoded = decode(value, FIELDS[key].kind)
        except DecodeError as error:
            self.problem(path, str(error))
            return False
        allowed = RANGES.get(key)
        if allowed is not None and decoded is not None and not allowed.holds(decoded):
            self.problem(path, f"{decoded:g} is out of range: it must be {allowed}. {remedy_of(key)}")
            return False
        self.settings[key] = Setting(decoded, f"{self.label} {path}")
        return True

    def report(self) -> KeyReport:
        """The keys so far."""
        return KeyReport(self.label, tuple(self.used), tuple(self.translated), tuple(self.ignored))


def read_keys(tree: Mapping[str, Any], label: str) -> Reading:
    """Walk the whole tree. Problems are collected, not raised."""
    reading = Reading(label)
    _walk(reading, tree, "", "")
    return reading


def whole(value: Any) -> Any:
    """2e8 as 200000000: JSON's numbers have one type."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _walk(reading: Reading, tree: Mapping[str, Any], section: str, written: str) -> None:
    """`section` is the modern spelling of what the file calls `written`; both end in a dot, or are empty at the top."""
    for name, value in tree.items():
        shown = f"{written}{name}"
        path = ALIASES.get(f"{section}{name}", f"{section}{name}")
        if "." in str(name):
            nested = "".join(f'{{"{part}": ' for part in shown.split(".")) + "…" + "}" * len(shown.split("."))
            reading.problem(shown, f"a key has no dots; sections stand in each other. Write {nested}.")
            continue
        if not _first(reading, path, shown, value):
            continue
        if path in TABLE:
            _enter(reading, path, shown, value)
        elif any(known.startswith(f"{path}.") for known in TABLE):
            _enter_section(reading, path, shown, value)
        else:
            reading.problem(shown, f"unknown key.{_hint(section.removesuffix('.'), str(name))}")


def _first(reading: Reading, path: str, shown: str, value: Any) -> bool:
    """Whether a key or section that has two spellings is met for the first time; twice is a problem if they differ. A
    section may stand in itself (tensor_parallel.tp): then its keys are compared."""
    before = reading.seen.setdefault(path, (shown, value))
    if before[0] == shown or shown.startswith(f"{before[0]}."):
        return before[0] == shown or isinstance(value, Mapping)
    if before[1] != value:
        said = "" if isinstance(value, Mapping) else f"{value} "
        other = "" if isinstance(before[1], Mapping) else f": {before[1]}"
        reading.problem(shown, f"{said}contradicts {before[0]}{other}, which means the same. Give one.")
    return False


def _enter_section(reading: Reading, path: str, shown: str, value: Any) -> None:
    if isinstance(value, Mapping):
        _walk(reading, value, f"{path}.", f"{shown}.")
    elif path == "zero_optimization" and isinstance(value, bool):  # DeepSpeed's first format
        reading.set(shown, "parallel.zero_stage", int(value))
        reading.translated.append((shown, f"stage {int(value)}"))
    elif value is not None:
        reading.problem(shown, f"expected a section {{…}}, got {value!r}.")


def _enter(reading: Reading, path: str, shown: str, value: Any) -> None:
    """Deal with one key of the table."""
    match TABLE[path]:
        case Dead(reason):
            reading.ignored.append((shown, reason))
        case Off(values, remedy):
            off = value is None or any(value == fine and isinstance(value, type(fine)) for fine in values)
            if off or value == AUTO:
                reading.ignored.append((shown, "is off" if value is not None else "is not given"))
            else:
                choice = " or ".join(map(repr, values))
                reading.problem(shown, f"{value!r} is not available{f' (only {choice})' if choice else ''}; {remedy}.")
        case Closed() as entry:
            _enter_closed(reading, entry, shown, value)
        case Named():
            if isinstance(value, Mapping):
                reading.named[path] = value
            elif value is not None:
                reading.problem(shown, f"expected a section with type and params, got {value!r}.")
        case Value(kind):
            _keep(reading, path, shown, value, kind)
        case To() as entry:
            _enter_setting(reading, entry, shown, value)


def _enter_closed(reading: Reading, entry: Closed, shown: str, value: Any) -> None:
    if isinstance(value, Mapping):
        _check_closed(reading, entry, shown, value)
        said = [value.get(switch) for switch in entry.switches] if entry.switches else [*value]
        on = any(each not in (None, False, AUTO) for each in said)
    else:
        on = value not in (None, False, AUTO)
    if entry.harmless or not on:
        reading.ignored.append((shown, entry.remedy if on else "is off"))
    else:
        reading.problem(shown, f"is not available; {entry.remedy}.")


def _check_closed(reading: Reading, entry: Closed, shown: str, section: Mapping[str, Any]) -> None:
    """A misspelt switch would leave the feature off without a word; other names are checked where they are known."""
    known = [*entry.switches, *entry.keys.split()]
    for name in section:
        near = did_you_mean(str(name), known)
        if name not in known and (entry.keys or near):
            reading.problem(f"{shown}.{name}", f"unknown key.{near or ' Remove it.'}")


def _keep(reading: Reading, path: str, shown: str, value: Any, kind: Any) -> None:
    if value is None:
        reading.used.append((shown, "left out"))
        return
    try:
        reading.values[path] = AUTO if value == AUTO else _decoded(value, kind)
    except DecodeError as error:
        reading.problem(shown, str(error))


def _decoded(value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, float):
        return value  # infinite too: steps_per_print is, with Accelerate
    return decode(whole(value) if kind is not float else value, kind)


def _enter_setting(reading: Reading, entry: To, shown: str, value: Any) -> None:
    keys, convert = entry.keys, entry.convert
    if value is None:
        reading.used.append((shown, "left out"))
        return
    if value == AUTO:
        reading.autos[shown] = keys
        return
    if convert is None:
        kind = FIELDS[keys[0]].kind
        raw = value if kind is float else whole(value)
        reading.used.append((shown, ", ".join(keys)))
    else:
        try:
            raw = convert(_decoded(value, entry.kind))
        except DecodeError as error:
            reading.problem(shown, str(error))
            return
        except OverflowError:
            reading.problem(shown, f"{value} is too large. Use 16, for instance.")
            return
        reading.translated.append((shown, f"{keys[0]} = {raw}"))
    for key in keys:
        if not reading.set(shown, key, raw):
            return


def _hint(section: str, name: str) -> str:
    foreign = FOREIGN.get(f"{section}.{name}" if section else name)
    if foreign is not None:
        return f" Here that is {foreign}."
    near = did_you_mean(name, section_keys(section))
    if near:
        return near
    places = [path for path in homes(name) if path.rpartition(".")[0] != section]
    if places:
        return f" It belongs in {' or '.join(path.rpartition('.')[0] or 'the top level' for path in places)}."
    return did_you_mean(name, {path.rpartition(".")[2]: path for path in TABLE}) or " Remove it."
