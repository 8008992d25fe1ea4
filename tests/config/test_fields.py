"""The table of settings: complete, documented, one name one field."""

from __future__ import annotations

import dataclasses

from megazero.config.fields import FIELDS, SECTIONS, docstrings, flag_of, section_of, value_of
from megazero.config.megatron import ALIASES, GROUP_QUERY_ATTENTION, explain
from megazero.config.schema import RunConfig


def test_table_has_every_field_of_every_section() -> None:
    config = RunConfig()
    assert set(SECTIONS) == {field.name for field in dataclasses.fields(config)} - {"origins"}
    for section in SECTIONS:
        names = [field.name for field in dataclasses.fields(getattr(config, section))]
        assert [field.name for field in FIELDS.values() if field.section == section] == names
    assert FIELDS["model.num_layers"].kind is int
    assert FIELDS["optimizer.lr"].default == 3e-4


def test_flags_are_unique_and_collide_with_nothing() -> None:
    flags = [field.flag for field in FIELDS.values()]
    negations = [f"--no-{field.flag[2:]}" for field in FIELDS.values() if field.is_switch]
    every = [*flags, *negations, *ALIASES, GROUP_QUERY_ATTENTION, "--recipe", "--print-config", "--help"]
    assert len(set(every)) == len(every)
    assert [flag for flag in every if explain(flag)] == []


def test_every_field_and_section_has_a_docstring() -> None:
    texts = docstrings()
    assert set(texts) == {*FIELDS, *SECTIONS}
    assert [key for key, text in texts.items() if len(text) < 10 or "\n\n" in text] == []
    assert texts["model.num_layers"] == "Number of transformer blocks."


def test_spellings() -> None:
    assert flag_of("parallel.tensor_model_parallel_size") == "--tensor-model-parallel-size"
    assert section_of("lr") == "optimizer"
    assert section_of("nothing") is None
    assert value_of(RunConfig(), "training.seed") == 1234
