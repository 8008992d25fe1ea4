"""What --model names: parameters of each family held to transformers' own models, numbers, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megazero.base.errors import ConfigError
from megazero.config.layers import Setting, assemble
from megazero.config.presets import PRESETS
from megazero.config.validate import resolve
from megazero.plan.flops import parameter_count
from megazero.plan.model_size import FAMILIES, ModelSize, model_size

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 48, "vocab_size": 131}
OPT = {
    key: SMALL[key]
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
}
OPT |= {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", SMALL | {"tie_word_embeddings": True, "head_dim": 32}),
    ("llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    ("mistral", SMALL),
    ("qwen2", SMALL),
    ("qwen2", SMALL | {"tie_word_embeddings": True}),
    ("qwen3", SMALL),
    ("gemma", SMALL),
    ("gemma2", SMALL | {"head_dim": 16}),
    ("phi3", SMALL),
    ("granite", SMALL),
    ("olmo2", SMALL),
    ("starcoder2", SMALL),
    ("gpt2", GPT2),
    ("gpt2", GPT2 | {"n_inner": 100}),
    ("gpt_neox", SMALL),
    ("gpt_neox", SMALL | {"attention_bias": False}),
    ("opt", OPT),
    ("opt", OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
]


def count(size: ModelSize) -> int:
    settings = {f"model.{key}": value for key, value in size.values.items()}
    settings |= {"data.mock_data": True, "data.seq_length": 32, "training.train_iters": 1}
    config = resolve(assemble([{key: Setting(value, "test") for key, value in settings.items()}]), 1)
    return parameter_count(config.model) + size.extra


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_parameters_are_those_of_the_real_model(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(family, **settings)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert count(model_size(str(tmp_path))) == sum(parameter.numel() for parameter in model.parameters())


def test_every_family_is_tried() -> None:
    assert {family for family, _ in CASES} == FAMILIES.keys()


def test_presets_and_their_names_on_the_hub() -> None:
    assert model_size("meta-llama/Llama-3.1-8B").values == PRESETS["llama3.1-8b"]
    assert count(model_size("gpt2")) == 124_439_808


@pytest.mark.parametrize("text", ["2M", "40M", "125M", "350m", "1.3e9", "7B", "70B", "175B", "1T", "7,000,000,000"])
def test_a_number_becomes_a_plausible_decoder(text: str) -> None:
    size = model_size(text)
    assert size.given is not None
    assert count(size) == pytest.approx(size.given, rel=0.15 if size.given < 1e9 else 0.05)
    if text == "7B":
        assert (size.given, size.values["hidden_size"]) == (7_000_000_000, 4096)


def test_a_file_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(GPT2 | {"model_type": "gpt2"}))
    assert model_size(str(path)).name == "tiny"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "the folder has no config.json. Any model can be given by its number of parameters: --model 7B."),
        ("{", "is not JSON (Expecting property name"),
        ('{"model_type": "qwen22"}', "no formula for a model of type 'qwen22'. There are those of"),
        ('{"hidden_size": 8}', "of type None. The file has no model_type. There are those of llama,"),
        ("[]", "of type None."),
        ('{"model_type": "gpt2", "n_embd": 8}', "a gpt2 config has 'n_head', and this one does not."),
    ],
)
def test_folders_without_a_model(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        model_size(str(tmp_path))
    assert words in str(caught.value)
    assert "--model 7B" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lama3-8b", "--model lama3-8b is no preset, no file or folder, and no number. Did you mean 'llama3-8b'?"),
        ("no/where", "There are gpt2, "),
        ("7", "--model 7: 7 parameters are no model. Write 7B, 350M or 1.3e9, for instance."),
    ],
)
def test_what_names_no_model(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_size(text)
    assert words in str(caught.value)
