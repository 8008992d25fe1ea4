"""Every recipe of the checkout resolves, and the numbers in its comments are the numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megazero.config.flags import parse_run_config
from megazero.config.layout import smallest_world_size
from megazero.config.recipe import RECIPES
from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from megazero.plan.flops import parameter_count

NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))


def recipe(name: str, *flags: str) -> RunConfig:
    """A recipe, with data of the user's own where it brings none."""
    config = parse_run_config(["--recipe", name, *flags])
    if not config.data.mock_data and not config.data.data_path:
        return parse_run_config(["--recipe", name, *flags, "--data-path", "mine"])
    return config


def test_the_promised_recipes_are_there() -> None:
    assert {"debug_cpu.yaml", "gpt2_124m.yaml", "llama3_8b.yaml", "llama3.2_1b.yaml", "llama3_405b.yaml"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_resolves(name: str) -> None:
    config = recipe(name)
    resolved = resolve(config, smallest_world_size(config))
    assert resolved.training.train_iters is not None


def test_debug_cpu_is_as_promised_and_fits_the_layouts() -> None:
    config = recipe("debug_cpu.yaml")
    model, training = config.model, config.training
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_query_groups) == (16, 64, 8, 4)
    assert (config.data.seq_length, model.vocab_size, config.data.mock_data) == (64, 512, True)
    assert (training.global_batch_size, training.micro_batch_size, training.precision) == (32, 2, "fp32")
    assert (model.hidden_dropout, model.attention_dropout, config.logging.log_interval) == (0.0, 0.0, 1)
    for tp in (1, 2, 4, 8):
        for dp in (1, 2, 4, 8, 16):
            resolve(recipe("debug_cpu.yaml", "--tensor-model-parallel-size", str(tp)), tp * dp)
    for iters in ("1", "10", "1000"):
        resolve(recipe("debug_cpu.yaml", "--train-iters", iters), 1)


@pytest.mark.parametrize("name", ["debug_cpu.yaml", "gpt2_124m.yaml", "llama3_8b.yaml", "llama3.2_1b.yaml"])
def test_arithmetic_in_the_comments(name: str) -> None:
    text = (Path(RECIPES) / name).read_text()
    config = resolve(recipe(name), recipe(name).parallel.tensor_model_parallel_size)
    numbers = set(re.findall(r"\d[\d,]*\d|\d", text))
    assert f"{parameter_count(config.model):,}" in numbers
    batch = config.training.global_batch_size
    assert f"{batch} · {config.data.seq_length}" in text
    micro_batches = (batch or 0) // config.training.micro_batch_size
    assert f"{micro_batches} micro-batches" in text


def test_tokens_of_a_step() -> None:
    steps = {"debug_cpu.yaml": 2_048, "gpt2_124m.yaml": 491_520, "llama3.2_1b.yaml": 1_048_576}
    for name, tokens in {**steps, "llama3_405b.yaml": 16_777_216}.items():
        config = recipe(name)
        assert (config.training.global_batch_size or 0) * config.data.seq_length == tokens
        assert f"{tokens:,} a step" in (RECIPES / name).read_text()
