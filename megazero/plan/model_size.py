"""The sizes of a model that a plan is made for: a preset, a Hugging Face config.json, or just a number of parameters.

    llama3-8b                  config/presets.py
    DIR or DIR/config.json     a Hugging Face model's, read without transformers: FAMILIES says which keys mean what
    7B, 350M, 1.3e9            parameters alone: a decoder of that many is assumed, with hidden = 128 · layers

Every one becomes the `model` section of the settings, so that the formulas of this layer serve all three. What a family
has beyond that section (a bias here, a norm there) is counted as `extra`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazero.base.errors import ConfigError
from megazero.config.decode import did_you_mean
from megazero.config.presets import PRESETS, preset_values

Values = dict[str, Any]


@dataclass(frozen=True)
class ModelSize:
    """A model as far as a plan needs it."""

    name: str
    values: Mapping[str, Any]
    """The `model` section of the settings."""
    extra: int = 0
    """Parameters that the section does not describe."""
    given: int | None = None
    """Number of parameters that was asked for, when the rest is assumed."""


def model_size(text: str) -> ModelSize:
    """What `--model text` names.

    Raises ConfigError when it is no preset, no folder or file with a config.json of a known family, and no number.
    """
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"--model {text}: the folder has no config.json. {_REMEDY}")
    if path.is_file():
        return _from_hugging_face(path)
    digits = re.sub(r"(?<=\d)[,_](?=\d{3})", "", text.upper())  # 7,000,000,000
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", digits) or re.fullmatch(r"(\d+(?:\.\d+)?E\d+)()", digits)
    if number:
        return _from_number(text, float(number[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[number[2]])
    try:
        values = preset_values(text, "--model")
    except ConfigError:
        raise ConfigError(
            f"--model {text} is no preset, no file or folder, and no number.{did_you_mean(text, PRESETS)} "
            f"There are {', '.join(PRESETS)}. {_REMEDY}"
        ) from None
    return ModelSize(text, {key.removeprefix("model."): value for key, value in values.items()})


_REMEDY = "Any model can be given by its number of parameters: --model 7B."


def _from_number(text: str, number: float) -> ModelSize:
    """A decoder with about so many parameters and the proportions of published ones."""
    if number < 1e5:
        raise ConfigError(
            f"--model {text}: {number:,.0f} parameters are no model. Write 7B, 350M or 1.3e9, for instance."
        )
    vocabulary = 32000

    def about(hidden: int) -> float:
        return 12 * max(hidden // 128, 1) * hidden**2 + 2 * vocabulary * hidden

    small = [64] if number < about(128) else []
    hidden = min([*small, *range(128, 65537, 128)], key=lambda hidden: abs(about(hidden) - number))
    heads = max(hidden // 128, 1)
    vocabulary = vocabulary if number > 1e8 else max(int(number / 8 / hidden), 128)
    layers = max(round((number - 2 * vocabulary * hidden) / (12 * hidden**2)), 1)
    values = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "vocab_size": vocabulary}
    return ModelSize(text, values, given=int(number))


def _from_hugging_face(path: Path) -> ModelSize:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"--model {path} is not JSON ({error}). {_REMEDY}") from None
    family = found.get("model_type") if isinstance(found, dict) else None
    if family not in FAMILIES:
        hint = "" if family else " The file has no model_type."  # a near name is another architecture
        raise ConfigError(
            f"--model {path}: no formula for a model of type {family!r}.{hint} There are those of "
            f"{', '.join(FAMILIES)}. {_REMEDY}"
        )
    try:
        values, extra = FAMILIES[family](found)
    except KeyError as missing:
        raise ConfigError(
            f"--model {path}: a {family} config has {missing}, and this one does not. {_REMEDY}"
        ) from None
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    return ModelSize(name, values | {"make_vocab_size_divisible_by": 1}, extra)


def _decoder(found: Values, tied: bool = False) -> Values:
    """Llama's keys, which most families share."""
    heads = found["num_attention_heads"]
    return {
        "num_layers": found["num_hidden_layers"],
        "hidden_size": found["hidden_size"],
        "ffn_hidden_size": found["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": found.get("num_key_value_heads") or heads,
        "kv_channels": found.get("head_dim") or found["hidden_size"] // heads,
        "vocab_size": found["vocab_size"],
        "max_position_embeddings": found.get("max_position_embeddings"),
        "untie_embeddings_and_output_weights": not found.get("tie_word_embeddings", tied),
    }


def _llama(found: Values) -> tuple[Values, int]:
    values, extra = _decoder(found), 0
    layers, hidden, ffn = values["num_layers"], values["hidden_size"], values["ffn_hidden_size"]
    if found.get("attention_bias"):
        values["add_qkv_bias"], extra = True, extra + layers * hidden
    if found.get("mlp_bias"):
        extra += layers * (2 * ffn + hidden)
    return values, extra


def _mistral(found: Values) -> tuple[Values, int]:
    return _decoder(found), 0


def _qwen2(found: Values) -> tuple[Values, int]:
    return _decoder(found) | {"add_qkv_bias": True}, 0


def _qwen3(found: Values) -> tuple[Values, int]:
    values, extra = _llama({"head_dim": 128} | found)
    return values | {"qk_layernorm": True}, extra


def _gemma(found: Values) -> tuple[Values, int]:
    values = _decoder({"head_dim": 256} | found, tied=True)
    norms = 2 * values["num_layers"] * values["hidden_size"] if found["model_type"] == "gemma2" else 0
    return values, norms


def _olmo2(found: Values) -> tuple[Values, int]:
    values, extra = _llama(found)
    widths = values["kv_channels"] * (values["num_attention_heads"] + values["num_query_groups"])
    return values, extra + values["num_layers"] * widths  # norms over all heads' queries and keys


_PLAIN: Values = {"activation": "gelu", "normalization": "LayerNorm", "add_bias_linear": True}
_LEARNED: Values = _PLAIN | {"position_embedding_type": "learned_absolute"}


def _starcoder2(found: Values) -> tuple[Values, int]:
    return _decoder(found, tied=True) | _PLAIN | {"add_bias_linear": found.get("use_bias", True)}, 0


def _gpt_neox(found: Values) -> tuple[Values, int]:
    values = _decoder(found) | _PLAIN | {"num_query_groups": found["num_attention_heads"]}
    missing = 4 * values["num_layers"] * values["hidden_size"] if not found.get("attention_bias", True) else 0
    return values, -missing


def _gpt2(found: Values) -> tuple[Values, int]:
    hidden, heads = found["n_embd"], found["n_head"]
    return _LEARNED | {
        "num_layers": found["n_layer"],
        "hidden_size": hidden,
        "ffn_hidden_size": found.get("n_inner") or 4 * hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "vocab_size": found["vocab_size"],
        "max_position_embeddings": found["n_positions"],
        "untie_embeddings_and_output_weights": not found.get("tie_word_embeddings", True),
    }, 0


def _opt(found: Values) -> tuple[Values, int]:
    values = _decoder(found | {"intermediate_size": found["ffn_dim"]}, tied=True) | _LEARNED
    hidden, narrow = values["hidden_size"], found.get("word_embed_proj_dim") or values["hidden_size"]
    extra = 2 * hidden  # positions begin at 2
    if not found.get("do_layer_norm_before", True):
        extra -= 2 * hidden  # no last norm
    if narrow != hidden:  # embeddings of another width, projected
        extra += values["vocab_size"] * (narrow - hidden) + 2 * narrow * hidden
    return values, extra


FAMILIES: dict[str, Callable[[Values], tuple[Values, int]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma,
    "phi3": _mistral,
    "granite": _llama,
    "olmo2": _olmo2,
    "starcoder2": _starcoder2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}
"""model_type -> (model section, parameters beyond it) of a config.json."""
