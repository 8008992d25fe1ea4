"""The typed decoder: what each type takes, and the words of each refusal."""

from __future__ import annotations

import datetime
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.config.decode import DecodeError, decode, describe, did_you_mean
from megazero.config.fields import FIELDS
from tests.config.settings import values

Colour = Literal["red", "blue"]


@pytest.mark.parametrize(
    ("value", "kind", "decoded"),
    [
        (3, int, 3),
        ("-12", int, -12),
        ("1_000", int, 1000),
        ("3e-4", float, 3e-4),
        (3, float, 3.0),
        (True, bool, True),
        ("true", str, "true"),
        ("red", Colour, "red"),
        ("1", Literal[0, 1], 1),
        (None, int | None, None),
        ("7", int | None, 7),
        ("red", Colour | None, "red"),
        (["0.7", "a b"], tuple[str, ...], ("0.7", "a b")),
        ([0.7, "a", 1], tuple[str, ...], ("0.7", "a", "1")),
        ("0.7 a", tuple[str, ...], ("0.7", "a")),
        ([], tuple[str, ...], ()),
    ],
)
def test_takes(value: object, kind: Any, decoded: object) -> None:
    result = decode(value, kind)
    assert result == decoded
    assert type(result) is type(decoded)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("abc", int, "expected a whole number, got 'abc'."),
        ("1e6", int, "expected a whole number, got '1e6'; write 1000000."),
        (3.0, int, "expected a whole number, got 3.0; write 3."),
        (3.5, int, "expected a whole number, got 3.5."),
        (True, int, "expected a whole number, got True."),
        ([1], int, "expected a whole number, got [1]."),
        ("fast", float, "expected a finite number, got 'fast'."),
        ("nan", float, "expected a finite number, got 'nan'."),
        (float("inf"), float, "expected a finite number, got inf."),
        (10**400, float, "expected a finite number, got 1000"),
        (False, float, "expected a finite number, got False."),
        ("yes", bool, "expected true or false, got 'yes'."),
        (1, bool, "expected true or false, got 1."),
        (123, str, "expected text, got the int 123; put it in quotes."),
        (datetime.date(2024, 1, 2), str, "expected text, got the date 2024-01-02; put it in quotes."),
        (None, int, "expected a whole number, got nothing; give a value or remove the key."),
        ("RED", Colour, "expected one of red, blue, got 'RED'. Did you mean 'red'?"),
        (True, Literal[0, 1], "expected one of 0, 1, got True."),
        ("green", Colour | None, "expected one of red, blue, got 'green'."),
        ({"a": 1}, tuple[str, ...], "expected a list of texts, got {'a': 1}; write [a, b]."),
        ("red RED", tuple[Colour, ...], "expected one of red, blue, got 'RED'. Did you mean 'red'?"),
        ([True], tuple[str, ...], "expected a list of texts, got [True]; write [a, b]."),
    ],
)
def test_refuses(value: object, kind: Any, words: str) -> None:
    with pytest.raises(DecodeError) as refusal:
        decode(value, kind)
    assert str(refusal.value).startswith(words)


@given(st.data())
def test_values_of_a_type_decode_to_themselves(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(list(FIELDS.values())))
    value = data.draw(values(field.kind))
    assert decode(list(value) if isinstance(value, tuple) else value, field.kind) == value


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
def test_numbers_decode_from_their_text(number: float) -> None:
    assert decode(str(number), type(number)) == number


def test_describes_types_in_words() -> None:
    assert describe(int | None) == "a whole number"
    assert describe(Colour) == "one of red, blue"
    assert describe(tuple[str, ...]) == "a list of texts"
    assert describe(tuple[Colour, ...]) == "some of red, blue"
    assert [describe(kind) for kind in (float, bool, str)] == ["a number", "true or false", "text"]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("num_layer", " Did you mean 'num_layers'?"),
        ("NUM-LAYERS", " Did you mean 'num_layers'?"),
        ("tensor", " Did you mean 'tensor_model_parallel_size'?"),
        ("zzz", ""),
    ],
)
def test_nearest_match(word: str, hint: str) -> None:
    assert did_you_mean(word, ["num_layers", "tensor_model_parallel_size"]) == hint
