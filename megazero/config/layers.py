"""Layers of settings and how they become one RunConfig: a later layer wins, key by key, and its origin with it.

    schema defaults  <  preset  <  recipe's base  <  recipe  <  flags

A few settings are rivals, two ways to say one thing (`train_iters` | `train_samples`): a layer that sets one of them
displaces what lower layers said with the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megazero.config.fields import FIELDS, SECTIONS
from megazero.config.presets import preset_values
from megazero.config.schema import RunConfig


class Setting(NamedTuple):
    """A value and where it came from: `recipes/x.yaml`, `flag --lr`, `preset gpt2`."""

    value: Any
    origin: str


Layer = Mapping[str, Setting]
"""Recipe key -> setting, for the keys that one source sets."""

RIVALS = (
    ("data.data_path", "data.mock_data"),
    ("training.train_iters", "training.train_samples"),
    ("optimizer.lr_warmup_iters", "optimizer.lr_warmup_fraction"),
)


def merge(layers: Iterable[Layer]) -> dict[str, Setting]:
    """One layer out of many, lowest first."""
    merged: dict[str, Setting] = {}
    for layer in layers:
        for pair in RIVALS:
            for chosen, rival in (pair, pair[::-1]):
                says = chosen in layer and layer[chosen].value != FIELDS[chosen].default
                if says and rival not in layer and rival in merged:
                    merged[rival] = Setting(FIELDS[rival].default, layer[chosen].origin)
        merged.update(layer)
    return merged


def assemble(layers: Iterable[Layer], below_preset: Layer | None = None) -> RunConfig:
    """The configuration of these layers (lowest first) over the schema's defaults and the preset that they name.

    `below_preset` stands between the schema's defaults and the preset. Raises ConfigError when there is no such preset.
    """
    layers = [below_preset or {}, *layers]
    merged = merge(layers)
    preset = merged.get("model.preset")
    if preset is not None and preset.value is not None:
        sizes = preset_values(preset.value, preset.origin)
        layers.insert(1, {key: Setting(value, f"preset {preset.value}") for key, value in sizes.items()})
        merged = merge(layers)
    origins = {key: merged[key].origin if key in merged else "default" for key in FIELDS}
    return with_settings(RunConfig(origins=origins), merged)


def with_settings(config: RunConfig, settings: Layer) -> RunConfig:
    """A copy of the configuration in which these keys have these values and origins."""
    changed: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        changed[section][name] = setting.value
    sections = {section: dataclasses.replace(getattr(config, section), **new) for section, new in changed.items()}
    origins = {**config.origins, **{key: setting.origin for key, setting in settings.items()}}
    return dataclasses.replace(config, **sections, origins=origins)
