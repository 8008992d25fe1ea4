"""Names in a ds_config: misspelt ones in sections that are off, two for one section, dotted ones, other programs'."""

from __future__ import annotations

from typing import Any

import pytest

from megazero.config.deepspeed import read_deepspeed
from megazero.config.deepspeed_keys import ALIASES, FOREIGN, TABLE, Closed
from tests.config.test_deepspeed_keys import of_kind, read, refusal, tree

BY_PRESENCE = ("compression_training", "sparse_attention")


@pytest.mark.parametrize("path", [path for path in of_kind(Closed) if path not in BY_PRESENCE])
def test_a_misspelt_switch_is_not_taken_for_off(path: str) -> None:
    entry = TABLE[path]
    assert isinstance(entry, Closed)
    assert refusal(tree(path, {"enabeld": True})) == f"config: {path}.enabeld: unknown key. Did you mean 'enabled'?"
    assert read(path, dict.fromkeys(entry.keys.split(), 1)).report.ignored or not entry.keys


def test_other_names_in_a_section_that_is_off() -> None:
    assert "config: comms_logger.verbos: unknown key. Did you mean 'verbose'?" in refusal(
        tree("comms_logger.verbos", 1)
    )
    assert "config: compile.fast: unknown key. Remove it." in refusal(tree("compile.fast", 1))
    assert read("elasticity", {"max_train_batch_size": 9}).report.ignored == (("elasticity", "is off"),)
    text = "config: compile: is not available; remove it, and use torch.compile on the model."
    assert refusal({"compile": {"deepcompile": True, "passes": ["z3"]}}) == text
    assert read("amp", {"enabled": "auto", "opt_level": "auto"}).report.ignored == (("amp", "is off"),)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"bf16": {"enabled": True}, "bfloat16": {"enabled": False}},
            "config: bfloat16: contradicts bf16, which means the same. Give one.",
        ),
        (
            {"bfloat16": {"enabled": True}, "bf16": {"check_grad_overflow": False}},
            "config: bf16: contradicts bfloat16, which means the same. Give one.",
        ),
        (
            {"aio": {"block_size": 100}, "zero_optimization": {"aio": {"block_size": 200}}},
            "config: zero_optimization.aio: contradicts aio, which means the same. Give one.",
        ),
        (
            {"tensor_parallel": {"enabled": True, "tp": {"enabled": False}}},
            "config: tensor_parallel.tp.enabled: False contradicts tensor_parallel.enabled: True, which means the "
            "same. Give one.",
        ),
        (
            {"zero_optimization.stage": 2, "zero_optimization": {"stage": 3}},
            "config: zero_optimization.stage: a key has no dots; sections stand in each other. "
            'Write {"zero_optimization": {"stage": …}}.',
        ),
        (
            {"zero_optimization": {"offload_param.device": "cpu"}},
            "config: zero_optimization.offload_param.device: a key has no dots; sections stand in each other. "
            'Write {"zero_optimization": {"offload_param": {"device": …}}}.',
        ),
    ],
)
def test_two_names_and_dots(source: dict[str, Any], message: str) -> None:
    assert refusal(source) == message


def test_equal_sections_under_two_names() -> None:
    assert read_deepspeed({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}).settings[
        "training.precision"
    ].value == ("bf16")
    tp = {"tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 2, "tp_grain_size": 1}}}
    assert read_deepspeed(tp).settings["parallel.tensor_model_parallel_size"].value == 2


@pytest.mark.parametrize(
    ("path", "here"),
    [
        ("micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
        ("max_grad_norm", "gradient_clipping"),
        ("clip_grad", "gradient_clipping"),
        ("lr", "optimizer.params.lr"),
        ("learning_rate", "optimizer.params.lr"),
        ("wandb.entity", "wandb.team"),
        ("seed", "torch.manual_seed in the script: a ds_config has no seed"),
        ("zero_stage", "zero_optimization.stage"),
    ],
)
def test_foreign_names_lead_to_the_key_that_means_it(path: str, here: str) -> None:
    assert refusal(tree(path, 1)) == f"config: {path}: unknown key. Here that is {here}."


def test_foreign_names_are_no_keys() -> None:
    assert not FOREIGN.keys() & (TABLE.keys() | ALIASES.keys())
    text = refusal({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}})
    assert text == "config: optimizer.params.learning_rate: AdamW has no such parameter. Here that is lr."
