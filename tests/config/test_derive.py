"""Derived values: their formulas, their origin, and that what the user said is left alone."""

from __future__ import annotations

import pytest

from megazero.config.derive import data_parallel_size, derive
from megazero.config.fields import FIELDS, docstrings, value_of
from tests.config.settings import config_with

# Filled in by those who know: the tokenizer, the machine, the loop with its checkpoint; or absent on purpose.
FILLED_ELSEWHERE = {
    "model.vocab_size",
    "parallel.ddp_bucket_size",
    "parallel.distributed_backend",
    "parallel.decoder_first_pipeline_num_layers",
    "parallel.decoder_last_pipeline_num_layers",
    "dry_run.world_size",
    "training.eval_interval",
    "recompute.recompute_method",
    "recompute.recompute_num_layers",
    "optimizer.lr_decay_iters",
    "optimizer.lr_wsd_decay_iters",
    "checkpoint.save_interval",
    "checkpoint.load",
    "checkpoint.ckpt_step",
    "checkpoint.keep_last",
}


@pytest.mark.parametrize(
    ("key", "value", "origin"),
    [
        ("model.ffn_hidden_size", 192, "derived: 8/3 · hidden-size, rounded up to 64s"),
        ("model.num_query_groups", 8, "derived: num-attention-heads"),
        ("model.kv_channels", 8, "derived: hidden-size / num-attention-heads"),
        ("model.max_position_embeddings", 1024, "derived: seq-length"),
        ("training.global_batch_size", 6, "derived: micro-batch-size · data-parallel size"),
        ("data.tokenizer_type", "NullTokenizer", "derived: from tokenizer-model"),
        ("data.data_cache_path", "runs/default/index-cache", "derived: under output-dir"),
        ("checkpoint.save", "runs/default/checkpoints", "derived: under output-dir"),
        ("logging.output_dir", "runs/default", "derived: runs/default"),
        ("logging.wandb_exp_name", "default", "derived: name of output-dir"),
    ],
)
def test_formula_and_origin(key: str, value: object, origin: str) -> None:
    sizes = {"parallel__tensor_model_parallel_size": 2, "training__micro_batch_size": 2}
    filled = derive(config_with(**sizes), 6)
    assert (value_of(filled, key), filled.origins[key]) == (value, origin)


@pytest.mark.parametrize(
    ("activation", "hidden", "ffn"),
    [
        ("swiglu", 768, 2048),
        ("swiglu", 4096, 10944),
        ("swiglu", 24, 64),
        ("gelu", 768, 3072),
        ("gelu_tanh", 64, 256),
        ("squared_relu", 64, 256),
    ],
)
def test_mlp_width(activation: str, hidden: int, ffn: int) -> None:
    config = config_with(model__activation=activation, model__hidden_size=hidden)
    assert derive(config, 1).model.ffn_hidden_size == ffn


def test_length_from_samples() -> None:
    config = config_with(training__train_iters=None, training__train_samples=103, training__global_batch_size=10)
    filled = derive(config, 1)
    assert filled.training.train_iters == 10
    assert filled.origins["training.train_iters"] == "derived: train-samples / global-batch-size"
    few = config_with(training__train_iters=None, training__train_samples=9, training__global_batch_size=10)
    assert derive(few, 1).training.train_iters is None


def test_a_tokenizers_files_are_hugging_faces_unless_said_otherwise() -> None:
    assert derive(config_with(data__tokenizer_model="t"), 1).data.tokenizer_type == "HuggingFaceTokenizer"


def test_names_follow_output_dir() -> None:
    filled = derive(config_with(logging__output_dir="runs/big one/"), 1)
    assert filled.checkpoint.save == "runs/big one/checkpoints"
    assert filled.logging.wandb_exp_name == "big one"


def test_what_is_said_is_left_alone() -> None:
    config = config_with(model__ffn_hidden_size=100, checkpoint__save="here", training__global_batch_size=12)
    filled = derive(config, 4)
    assert (filled.model.ffn_hidden_size, filled.checkpoint.save, filled.training.global_batch_size) == (
        100,
        "here",
        12,
    )
    assert filled.origins["checkpoint.save"] == "flag --save"


def test_without_the_number_of_ranks_only_the_batch_stays_open() -> None:
    assert derive(config_with(), None).training.global_batch_size is None
    assert derive(config_with(), None).model.ffn_hidden_size == 192


def test_deriving_twice_changes_nothing() -> None:
    filled = derive(config_with(), 3)
    assert derive(filled, 3) == filled
    assert derive(filled, 3).origins == filled.origins


def test_every_field_that_promises_to_be_derived_is() -> None:
    filled = derive(config_with(), 1)
    promised = {key for key, field in FIELDS.items() if field.default is None and "Derived:" in docstrings()[key]}
    assert {key for key in promised if value_of(filled, key) is None} <= FILLED_ELSEWHERE
    assert promised >= FILLED_ELSEWHERE


def test_data_parallel_size_is_what_the_model_leaves() -> None:
    config = config_with(parallel__tensor_model_parallel_size=4)
    assert [data_parallel_size(config, world) for world in (4, 8, 9, 2)] == [1, 2, 2, 1]
