"""Presets have the published sizes: the parameter counts of the released weights."""

from __future__ import annotations

import dataclasses

import pytest

from megazero.config.layers import Setting, assemble
from megazero.config.presets import PRESETS, preset_values
from megazero.config.schema import RunConfig, TransformerConfig
from megazero.config.validate import resolve
from megazero.plan.flops import parameter_count

PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}


def preset(name: str) -> RunConfig:
    layer = {"model.preset": name, "data.mock_data": True, "training.train_iters": 10}
    return assemble([{key: Setting(value, "flag") for key, value in layer.items()}])


def test_every_preset_has_a_published_count() -> None:
    assert set(PARAMETERS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name: str) -> None:
    assert parameter_count(resolve(preset(name), 1).model) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_fields_exist_and_positions_are_learned_only_in_gpt2(name: str) -> None:
    assert set(PRESETS[name]) <= {field.name for field in dataclasses.fields(TransformerConfig)}
    model = preset(name).model
    assert model.position_embedding_type == ("learned_absolute" if name.startswith("gpt2") else "rope")
    assert model.hidden_dropout == model.attention_dropout == 0.0


@pytest.mark.parametrize(
    ("name", "positions", "tied", "factor"),
    [("llama3-8b", 8192, False, None), ("llama3.1-8b", 131072, False, 8.0), ("llama3.2-1b", 131072, True, 32.0)],
)
def test_llama_generations(name: str, positions: int, tied: bool, factor: float | None) -> None:
    model = preset(name).model
    assert (model.max_position_embeddings, model.rotary_base) == (positions, 500000.0)
    assert model.untie_embeddings_and_output_weights is not tied
    assert (model.rope_scaling_factor if model.use_rope_scaling else None) == factor


@pytest.mark.parametrize(
    ("hub", "name"),
    [
        ("meta-llama/Meta-Llama-3-8B", "llama3-8b"),
        ("meta-llama/Llama-3.2-1B", "llama3.2-1b"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
    ],
)
def test_names_of_the_hub(hub: str, name: str) -> None:
    assert preset_values(hub, "flag --preset") == preset_values(name, "flag --preset")
