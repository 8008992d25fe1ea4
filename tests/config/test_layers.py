"""Merging layers: later wins key by key, rivals are displaced, presets stand below recipes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import ConfigError
from megazero.config.fields import FIELDS, value_of
from megazero.config.layers import RIVALS, Setting, assemble, merge, with_settings
from megazero.config.presets import PRESETS
from megazero.config.schema import RunConfig
from tests.config.settings import layers

PLAIN = [key for key in FIELDS if key != "model.preset" and not any(key in pair for pair in RIVALS)]


@given(st.lists(st.integers(0, 9).flatmap(lambda n: layers(f"layer {n}", PLAIN)), max_size=4))
def test_last_layer_that_sets_a_key_wins_and_gives_the_origin(stack: list[dict[str, Setting]]) -> None:
    merged = merge(stack)
    assert set(merged) == {key for layer in stack for key in layer}
    for key, setting in merged.items():
        assert setting == [layer[key] for layer in stack if key in layer][-1]


@given(layers("a"), layers("b"), layers("c"))
def test_merging_in_two_steps_is_merging_at_once(
    a: dict[str, Setting], b: dict[str, Setting], c: dict[str, Setting]
) -> None:
    assert merge([merge([a, b]), c]) == merge([a, b, c])


@given(layers("a"))
def test_merging_a_layer_with_itself_or_nothing_changes_nothing(layer: dict[str, Setting]) -> None:
    assert merge([layer]) == layer
    assert merge([layer, layer]) == layer
    assert merge([{}, layer, {}]) == layer


@given(layers("a"))
def test_assembling_sets_values_and_an_origin_for_every_key(layer: dict[str, Setting]) -> None:
    config = assemble([layer])
    assert set(config.origins) == set(FIELDS)
    for key, field in FIELDS.items():
        expected = layer.get(key, Setting(field.default, "default"))
        assert (value_of(config, key), config.origins[key]) == expected


@pytest.mark.parametrize(
    ("below", "above", "displaced"),
    [
        (("data.mock_data", True), ("data.data_path", ("a",)), False),
        (("data.data_path", ("a",)), ("data.mock_data", True), ()),
        (("training.train_iters", 10), ("training.train_samples", 64), None),
        (("training.train_samples", 64), ("training.train_iters", 10), None),
        (("optimizer.lr_warmup_iters", 5), ("optimizer.lr_warmup_fraction", 0.1), 0),
        (("optimizer.lr_warmup_fraction", 0.1), ("optimizer.lr_warmup_iters", 5), None),
    ],
)
def test_a_rival_is_displaced_by_a_higher_layer(
    below: tuple[str, object], above: tuple[str, object], displaced: object
) -> None:
    merged = merge([{below[0]: Setting(below[1], "recipe")}, {above[0]: Setting(above[1], "flag")}])
    assert merged == {below[0]: Setting(displaced, "flag"), above[0]: Setting(above[1], "flag")}


def test_rivals_of_one_layer_stay_for_validation_to_report() -> None:
    layer = {"data.mock_data": Setting(True, "x"), "data.data_path": Setting(("a",), "x")}
    assert merge([layer]) == layer


def test_a_default_said_aloud_displaces_nothing() -> None:
    merged = merge([{"data.data_path": Setting(("a",), "base")}, {"data.mock_data": Setting(False, "x")}])
    assert merged["data.data_path"] == Setting(("a",), "base")


def test_preset_stands_between_defaults_and_recipe() -> None:
    recipe = {"model.preset": Setting("gpt2", "r.yaml"), "model.num_layers": Setting(3, "r.yaml")}
    config = assemble([recipe], below_preset={"model.num_query_groups": Setting(1, "flag --group-query-attention")})
    assert (config.model.num_layers, config.origins["model.num_layers"]) == (3, "r.yaml")
    assert (config.model.hidden_size, config.origins["model.hidden_size"]) == (768, "preset gpt2")
    assert (config.model.num_query_groups, config.origins["model.num_query_groups"]) == (12, "preset gpt2")
    assert (config.model.init_method_std, config.origins["model.init_method_std"]) == (0.02, "default")


def test_a_higher_preset_replaces_a_lower_one_whole() -> None:
    config = assemble([{"model.preset": Setting("gpt2", "r.yaml")}, {"model.preset": Setting("llama3-8b", "flag")}])
    assert all(getattr(config.model, name) == value for name, value in PRESETS["llama3-8b"].items())
    assert config.model.normalization == "RMSNorm"


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError) as error:
        assemble([{"model.preset": Setting("lama3-8b", "flag --preset")}])
    assert str(error.value).startswith(
        "--preset lama3-8b (flag --preset) is no preset. Did you mean 'llama3-8b'? There are gpt2, gpt2-medium,"
    )


def test_with_settings_leaves_the_original_alone() -> None:
    config = RunConfig(origins={"training.seed": "flag --seed"})
    changed = with_settings(config, {"model.vocab_size": Setting(99, "tokenizer t")})
    assert changed.model.vocab_size == 99
    assert changed.origins == {"training.seed": "flag --seed", "model.vocab_size": "tokenizer t"}
    assert config.model.vocab_size is None
    assert config.origins == {"training.seed": "flag --seed"}
