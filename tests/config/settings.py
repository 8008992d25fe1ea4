"""Random values for the schema's fields, and a configuration that resolves, for the tests of this folder."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, Union

from hypothesis import strategies as st

from megazero.config.fields import FIELDS
from megazero.config.layers import Setting, assemble
from megazero.config.schema import RunConfig


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return st.one_of(st.none(), *(values(arm) for arm in typing.get_args(kind) if arm is not type(None)))
    if origin is Literal:
        return st.sampled_from(typing.get_args(kind))
    if origin is tuple:
        return st.lists(values(typing.get_args(kind)[0]), max_size=3).map(tuple)
    return {
        int: st.integers(-(10**18), 10**18),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(),
    }[kind]


@st.composite
def layers(draw: st.DrawFn, origin: str, keys: list[str] | None = None) -> dict[str, Setting]:
    """A layer that sets some keys (`model.preset` is left out: it brings a layer of its own)."""
    allowed = keys if keys is not None else [key for key in FIELDS if key != "model.preset"]
    chosen = draw(st.lists(st.sampled_from(allowed), unique=True, max_size=12))
    return {key: Setting(draw(values(FIELDS[key].kind)), origin) for key in chosen}


def config_with(**changes: Any) -> RunConfig:
    """A small valid configuration on mock data, with changes by recipe key (`model__num_layers=3`)."""
    small = {
        "data.mock_data": True,
        "model.vocab_size": 512,
        "model.hidden_size": 64,
        "model.num_attention_heads": 8,
        "training.train_iters": 100,
    }
    small.update({key.replace("__", "."): value for key, value in changes.items()})
    return assemble([{key: Setting(value, f"flag {FIELDS[key].flag}") for key, value in small.items()}])
