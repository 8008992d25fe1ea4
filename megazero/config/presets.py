"""Published models: names and the exact sizes that become defaults of the `model` section.

GPT-2: "Language Models are Unsupervised Multitask Learners" and its released weights. Llama 3, 3.1, 3.2: "The Llama 3
Herd of Models" (arXiv 2407.21783) and the config.json of the released weights. Dropout stays 0 everywhere.
"""

from __future__ import annotations

from typing import Any

from megazero.base.errors import ConfigError
from megazero.config.decode import did_you_mean

_GPT2: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "activation": "gelu_tanh",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
    "vocab_size": 50257,
}
_LLAMA3: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "position_embedding_type": "rope",
    "rotary_base": 500000.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "activation": "swiglu",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 128256,
}
_LLAMA31 = {**_LLAMA3, "max_position_embeddings": 131072, "use_rope_scaling": True, "rope_scaling_factor": 8.0}
_LLAMA32 = {**_LLAMA31, "rope_scaling_factor": 32.0, "untie_embeddings_and_output_weights": False}


def _sizes(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": hidden // heads,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, **_sizes(12, 768, 3072, 12, 12)},
    "gpt2-medium": {**_GPT2, **_sizes(24, 1024, 4096, 16, 16)},
    "gpt2-large": {**_GPT2, **_sizes(36, 1280, 5120, 20, 20)},
    "gpt2-xl": {**_GPT2, **_sizes(48, 1600, 6400, 25, 25)},
    "llama3-8b": {**_LLAMA3, **_sizes(32, 4096, 14336, 32, 8)},
    "llama3-70b": {**_LLAMA3, **_sizes(80, 8192, 28672, 64, 8)},
    "llama3.1-8b": {**_LLAMA31, **_sizes(32, 4096, 14336, 32, 8)},
    "llama3.1-70b": {**_LLAMA31, **_sizes(80, 8192, 28672, 64, 8)},
    "llama3.1-405b": {**_LLAMA31, **_sizes(126, 16384, 53248, 128, 8)},
    "llama3.2-1b": {**_LLAMA32, **_sizes(16, 2048, 8192, 32, 8)},
    "llama3.2-3b": {**_LLAMA32, **_sizes(28, 3072, 8192, 24, 8)},
}
"""Preset -> values of the `model` section."""


def preset_values(name: str, origin: str) -> dict[str, Any]:
    """Recipe key -> value for a preset. The spelling of the Hugging Face hub (`meta-llama/Llama-3.2-1B`) works too.

    Raises ConfigError, naming the origin of the name, when there is no such preset.
    """
    short = name.lower().rpartition("/")[2].removeprefix("meta-").replace("llama-", "llama")
    if short not in PRESETS:
        raise ConfigError(
            f"--preset {name} ({origin}) is no preset.{did_you_mean(short, PRESETS)} There are {', '.join(PRESETS)}."
        )
    return {f"model.{field}": value for field, value in PRESETS[short].items()}
