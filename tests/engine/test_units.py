"""Which modules of a user's model are gathered as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megazero.engine.units import units_of
from tests.engine.fronts import hf_model, make


def test_repeated_members_of_lists() -> None:
    assert units_of(make()) == ["blocks.0", "blocks.1", "norm", "head"]


def test_hugging_face_says_it() -> None:
    assert units_of(hf_model("gpt2")) == [
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0",
        "transformer.h.1",
        "transformer.ln_f",
        "lm_head",  # whose weight is the embedding's
    ]
    assert units_of(hf_model("llama")) == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(2))
        self.single = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU()])


def test_outermost_blocks_win_and_lone_members_are_leaves() -> None:
    assert units_of(Nested()) == ["layers.0", "layers.1", "single.0"]


def test_one_sequence() -> None:
    assert units_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))) == ["0", "2"]
    assert units_of(nn.Linear(2, 2)) == []


class Named(nn.Module):
    units: Any = ("a",)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)


def test_a_module_that_says_its_units_itself() -> None:
    module = Named()
    assert units_of(module) == ["a"]
    module.units = ["a", "b"]
    assert units_of(module) == ["a", "b"]
