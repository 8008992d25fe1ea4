"""The strict typed decoder that flags and recipes share: raw value + type hint -> value, or a clear refusal.

YAML reads `3e-4` as text and `yes` as a boolean, and a flag's value is always text; the field's type decides:

    float: 3, 3.0, "3e-4"     int: 3, "3"     bool: true | false     str: text only (numbers and dates need quotes)
    Literal: one of its values     X | None: null or X     tuple[X, ...]: a list, or text split at blanks
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union


class DecodeError(ValueError):
    """A value does not have its field's type. The message is a sentence that follows the setting's name: `lr: …`."""


def decode(value: object, kind: Any) -> Any:
    """Turn a raw value (from YAML, or a flag's text) into a value of type `kind`.

    Raises DecodeError when it isn't one.
    """
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (arm for arm in typing.get_args(kind) if arm is not type(None))
        return decode(value, kind)
    if value is None:
        raise DecodeError(f"expected {describe(kind)}, got nothing; give a value or remove the key.")
    if origin is Literal:
        return _decode_literal(value, typing.get_args(kind))
    if origin is tuple:
        (item, _) = typing.get_args(kind)
        return tuple(decode(text, item) for text in _decode_texts(value))
    return _DECODERS[kind](value)


def describe(kind: Any) -> str:
    """A type hint in words, e.g. `a whole number`."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in typing.get_args(kind) if arm is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    if origin is tuple:
        item = typing.get_args(kind)[0]
        return "a list of texts" if item is str else describe(item).replace("one of", "some of")
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the candidate nearest to a misspelt word, or an empty string when none is near."""
    by_folded = {candidate.lower().replace("_", "-"): candidate for candidate in candidates}
    folded = word.lower().replace("_", "-")
    longer = [candidate for candidate in by_folded if f"{candidate}-".startswith(f"{folded}-")]  # an abbreviation
    near = sorted(longer, key=len)[:1] or difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    return f" Did you mean {by_folded[near[0]]!r}?" if near else ""


def _decode_literal(value: object, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if str(choice) == str(value) and not isinstance(value, bool):
            return choice
    hint = did_you_mean(str(value), [str(choice) for choice in choices])
    raise DecodeError(f"expected one of {', '.join(str(choice) for choice in choices)}, got {value!r}.{hint}")


def _decode_texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(value.split())
    if isinstance(value, list | tuple):
        good = all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in value)
        if good:
            return tuple(str(item) for item in value)
    raise DecodeError(f"expected a list of texts, got {value!r}; write [a, b].")


def _decode_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise DecodeError(f"expected true or false, got {value!r}.")


def _decode_int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", value.strip()):
        return int(value)
    raise DecodeError(f"expected a whole number, got {value!r}{_whole(value)}.")


def _whole(value: object) -> str:
    """A hint for 1e6 and 1000.0: the same number written as a whole one."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return ""
    return f"; write {int(number)}" if number.is_integer() else ""


def _decode_float(value: object) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise DecodeError(f"expected a finite number, got {value!r}.")
    return number


def _decode_str(value: object) -> str:
    if isinstance(value, str):
        return value
    raise DecodeError(f"expected text, got the {type(value).__name__} {value!s}; put it in quotes.")


_DECODERS = {bool: _decode_bool, int: _decode_int, float: _decode_float, str: _decode_str}
