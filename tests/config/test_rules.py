"""Every rule about settings: the message when it fails, silence when it holds, and all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import ConfigError
from megazero.config.derive import derive
from megazero.config.fields import FIELDS
from megazero.config.layers import Setting, with_settings
from megazero.config.ranges import RANGES, Range, remedy_of
from megazero.config.rules import find_problems, show
from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from tests.config.settings import config_with


def problems(world: int | None = 1, **changes: Any) -> list[str]:
    return find_problems(derive(config_with(**changes), world), world)


def test_a_sound_configuration_has_no_problems() -> None:
    assert problems() == []
    assert problems(None) == []
    assert problems(8, parallel__tensor_model_parallel_size=2, training__global_batch_size=16) == []


CASES: list[tuple[int, dict[str, Any], str]] = [
    (
        6,
        {"parallel__tensor_model_parallel_size": 4},
        "world size 6 does not fit tp·pp·cp = 4·1·1 = 4: the world size must be a multiple of it. "
        "Start 4 or 8 ranks, or change the parallel sizes.",
    ),
    (
        3,
        {"parallel__context_parallel_size": 3, "data__seq_length": 1024},
        "--seq-length 1024 is not divisible by 6 for --context-parallel-size 3: each rank takes two of 2 · cp = 6 "
        "equal chunks. Use --seq-length 1020 or 1026, or --context-parallel-size 2 or 4.",
    ),
    (
        8,
        {
            "parallel__context_parallel_size": 2,
            "parallel__tensor_model_parallel_size": 4,
            "parallel__sequence_parallel": True,
            "data__seq_length": 1028,
        },
        "--seq-length 1028 is not divisible by 8 for --context-parallel-size 2: each rank takes two of 2 · cp = 4 "
        "equal chunks, and tp = 4 ranks share its tokens with --sequence-parallel. Use --seq-length 1024 or 1032, or "
        "--context-parallel-size 1.",
    ),
    (
        4,
        {
            "parallel__context_parallel_size": 4,
            "parallel__cp_comm_type": "a2a",
            "model__num_attention_heads": 6,
            "model__hidden_size": 48,
        },
        "--num-attention-heads 6 is not divisible by tp · cp = 1 · 4 = 4: --cp-comm-type a2a gives each rank whole "
        "heads. Use --context-parallel-size 3 or 6, --num-attention-heads 4 or 8, or --cp-comm-type p2p.",
    ),
    (
        4,
        {
            "parallel__context_parallel_size": 4,
            "parallel__cp_comm_type": "a2a",
            "model__num_attention_heads": 6,
            "model__hidden_size": 48,
            "model__attention_dropout": 0.1,
        },
        "--num-attention-heads 6 is not divisible by tp · cp = 1 · 4 = 4: --cp-comm-type a2a gives each rank whole "
        "heads. Use --context-parallel-size 3 or 6, --num-attention-heads 4 or 8.",
    ),
    (
        2,
        {"parallel__context_parallel_size": 2, "model__attention_dropout": 0.1},
        "--attention-dropout 0.1 with --context-parallel-size 2 and --cp-comm-type p2p (default): a ring never has a "
        "row of attention probabilities together to drop from. Use --attention-dropout 0, or --cp-comm-type a2a.",
    ),
    (
        3,
        {
            "parallel__context_parallel_size": 3,
            "data__seq_length": 1026,
            "model__attention_dropout": 0.1,
            "model__num_query_groups": 8,
        },
        "--attention-dropout 0.1 with --context-parallel-size 3 and --cp-comm-type p2p (default): a ring never has a "
        "row of attention probabilities together to drop from. Use --attention-dropout 0.",
    ),
    (
        2,
        {"parallel__expert_model_parallel_size": 2},
        "--expert-model-parallel-size 2: the models of pretrain_gpt.py have no experts yet; initialize() spreads those "
        "of MoE layers. Use --expert-model-parallel-size 1.",
    ),
    (
        2,
        {"training__micro_batch_size": 2, "training__global_batch_size": 6},
        "--global-batch-size 6 is not divisible by micro-batch-size · data-parallel size = 2 · 2 = 4: each step takes "
        "whole micro-batches on every replica. Use --global-batch-size 4 or 8, or another --micro-batch-size.",
    ),
    (
        4,
        {"training__global_batch_size": 2},
        "--global-batch-size 2 is not divisible by micro-batch-size · data-parallel size = 1 · 4 = 4: each step takes "
        "whole micro-batches on every replica. Use --global-batch-size 4, or another --micro-batch-size.",
    ),
    (
        1,
        {"model__hidden_size": 60},
        "--hidden-size 60 is not divisible by --num-attention-heads 8: a head is hidden-size / num-attention-heads "
        "wide. Use --hidden-size 56 or 64, or set --kv-channels.",
    ),
    (
        1,
        {"model__num_query_groups": 3},
        "--num-attention-heads 8 is not divisible by --num-query-groups 3: each key/value head serves equally many "
        "query heads. Use --num-query-groups 2 or 4.",
    ),
    (
        3,
        {
            "parallel__tensor_model_parallel_size": 3,
            "model__num_query_groups": 1,
            "model__vocab_size": 384,
            "data__seq_length": 1026,
        },
        "--num-attention-heads 8 is not divisible by --tensor-model-parallel-size 3: each rank holds whole heads. "
        "Use --tensor-model-parallel-size 2 or 4, or --num-attention-heads 6 or 9.",
    ),
    (
        4,
        {
            "parallel__tensor_model_parallel_size": 4,
            "model__num_attention_heads": 12,
            "model__num_query_groups": 6,
            "model__hidden_size": 96,
        },
        "--num-query-groups 6 and --tensor-model-parallel-size 4: one must divide the other, so that ranks hold whole "
        "key/value heads or equal copies. Use --tensor-model-parallel-size 3 or 6.",
    ),
    (
        4,
        {"parallel__tensor_model_parallel_size": 4, "model__ffn_hidden_size": 102},
        "--ffn-hidden-size 102 is not divisible by --tensor-model-parallel-size 4: the MLP is split evenly. "
        "Use --tensor-model-parallel-size 3 or 6, or --ffn-hidden-size 100 or 104.",
    ),
    (
        4,
        {
            "parallel__tensor_model_parallel_size": 4,
            "model__vocab_size": 99,
            "model__make_vocab_size_divisible_by": 10,
        },
        "",  # 100 rows on 4 ranks
    ),
    (
        8,
        {
            "parallel__tensor_model_parallel_size": 8,
            "model__vocab_size": 99,
            "model__make_vocab_size_divisible_by": 10,
        },
        "--vocab-size 99 padded to a multiple of 10 is 100, which is not divisible by --tensor-model-parallel-size 8: "
        "the embedding's rows are split evenly. Use --make-vocab-size-divisible-by 40.",
    ),
    (
        3,
        {
            "parallel__tensor_model_parallel_size": 3,
            "model__num_attention_heads": 12,
            "model__hidden_size": 96,
            "model__num_query_groups": 1,
            "model__ffn_hidden_size": 96,
            "model__vocab_size": 384,
        },
        "--seq-length 1024 (default) is not divisible by --tensor-model-parallel-size 3: sequence parallelism splits "
        "the tokens evenly. Use --seq-length 1023 or 1026, or --no-sequence-parallel.",
    ),
    (
        1,
        {"model__kv_channels": 7},
        "--kv-channels 7 and --rotary-percent 1.0 (default) rotate 7 channels of a head: RoPE rotates pairs, so the "
        "number must be even and above 0. Use --kv-channels 8 with --rotary-percent 1, or "
        "--position-embedding-type none.",
    ),
    (
        1,
        {"model__rotary_percent": 0.1},
        "--kv-channels 8 (derived: hidden-size / num-attention-heads) and --rotary-percent 0.1 rotate 0 channels of a "
        "head: RoPE rotates pairs, so the number must be even and above 0. Use --kv-channels 8 with --rotary-percent "
        "1, or --position-embedding-type none.",
    ),
    (1, {"model__kv_channels": 7, "model__position_embedding_type": "learned_absolute"}, ""),
    (
        1,
        {"data__seq_length": 2048, "model__max_position_embeddings": 1024},
        "--seq-length 2048 is above --max-position-embeddings 1024: samples may not be longer than the model accepts. "
        "Use --seq-length 1024, or --max-position-embeddings 2048.",
    ),
    (
        1,
        {"data__mock_data": False},
        "neither --data-path nor --mock-data is given: a run needs data. Give --data-path PREFIX, or --mock-data.",
    ),
    (1, {"data__data_path": ("a", "b")}, "--data-path a b and --mock-data exclude each other. Give one."),
    (
        1,
        {"data__split": "9;1"},
        "--split '9;1' is not a split: give one to three numbers >= 0 for train, validation and test, the first "
        "above 0, such as 969,30,1.",
    ),
    (
        1,
        {"data__tokenizer_type": "SentencePieceTokenizer"},
        "--tokenizer-type SentencePieceTokenizer needs its files. Give --tokenizer-model PATH, or --tokenizer-type "
        "NullTokenizer.",
    ),
    (
        1,
        {"data__tokenizer_type": "NullTokenizer", "data__tokenizer_model": "t"},
        "--tokenizer-type NullTokenizer has no files, but --tokenizer-model t is given. Remove one of them.",
    ),
    (
        1,
        {"model__vocab_size": None},
        "the vocabulary's size is unknown: neither --vocab-size nor --tokenizer-model is given. "
        "Give --vocab-size N for --mock-data or ready token ids, else --tokenizer-model PATH.",
    ),
    (1, {"model__vocab_size": None, "data__tokenizer_model": "t"}, ""),
    (
        1,
        {"training__sample_prompt": "def f"},
        "--sample-prompt def f is text, and there is no tokenizer to read it. "
        "Give --tokenizer-model PATH, or remove it.",
    ),
    (
        1,
        {"training__train_iters": None},
        "the length of training is unknown. Give --train-iters N, or --train-samples N.",
    ),
    (
        1,
        {"training__train_samples": 100},
        "--train-iters 100 and --train-samples 100 exclude each other. Give one.",
    ),
    (1, {"training__train_iters": None, "training__train_samples": 100}, ""),
    (
        1,
        {"optimizer__min_lr": 1e-3},
        "--min-lr 0.001 is above --lr 0.0003 (default): the learning rate rises to lr and then decays. "
        "Use a --min-lr of at most 0.0003.",
    ),
    (
        1,
        {"optimizer__lr_warmup_init": 1.0, "optimizer__lr": 0.5},
        "--lr-warmup-init 1.0 is above --lr 0.5: the learning rate rises to lr and then decays. "
        "Use a --lr-warmup-init of at most 0.5.",
    ),
    (
        1,
        {"optimizer__lr_warmup_iters": 5, "optimizer__lr_warmup_fraction": 0.1},
        "--lr-warmup-iters 5 and --lr-warmup-fraction 0.1 exclude each other. Give one.",
    ),
    (
        1,
        {"optimizer__lr_warmup_iters": 100},
        "--lr-warmup-iters 100 is not below --train-iters 100: the warmup must end before the decay does. "
        "Use --lr-warmup-iters 10, or a larger --lr-decay-iters.",
    ),
    (
        1,
        {"optimizer__lr_warmup_iters": 51, "optimizer__lr_decay_iters": 50},
        "--lr-warmup-iters 51 is not below --lr-decay-iters 50: the warmup must end before the decay does. "
        "Use --lr-warmup-iters 5, or a larger --lr-decay-iters.",
    ),
    (1, {"optimizer__lr_warmup_iters": 99}, ""),
    (
        1,
        {"optimizer__lr_decay_style": "WSD", "optimizer__lr_wsd_decay_iters": 81, "optimizer__lr_warmup_iters": 20},
        "--lr-wsd-decay-iters 81 does not fit between a warmup of 20 steps and --train-iters 100: WSD decays at the "
        "end. Use --lr-wsd-decay-iters 80 or less, or a larger --lr-decay-iters.",
    ),
    (
        1,
        {"optimizer__lr_decay_style": "WSD", "optimizer__lr_warmup_fraction": 0.95},
        "--lr-wsd-decay-iters 10 does not fit between a warmup of 95 steps and --train-iters 100: WSD decays at the "
        "end. Use --lr-wsd-decay-iters 5 or less, or a larger --lr-decay-iters.",
    ),
    (
        1,
        {"optimizer__lr_decay_style": "WSD", "optimizer__lr_wsd_decay_iters": 80, "optimizer__lr_warmup_iters": 20},
        "",
    ),
    (1, {"optimizer__lr_decay_style": "cosine", "optimizer__lr_wsd_decay_iters": 500}, ""),
    (
        1,
        {"training__train_iters": None, "training__train_samples": 3, "training__global_batch_size": 4},
        "--train-samples 3 is less than the samples of one step: --global-batch-size 4. Use --train-samples 4 or more.",
    ),
    (
        1,
        {"checkpoint__finetune": True},
        "--finetune takes the weights of --load, which is not given. Give --load DIR, or --no-finetune.",
    ),
    (1, {"checkpoint__ckpt_step": 5}, ""),
    (1, {"checkpoint__ckpt_step": 5, "checkpoint__finetune": True, "checkpoint__load": "d"}, ""),
]


@pytest.mark.parametrize(("world", "changes", "message"), CASES)
def test_a_rule_reports_values_rule_and_remedy(world: int, changes: dict[str, Any], message: str) -> None:
    assert problems(world, **changes) == ([message] if message else [])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.num_layers", 0, "--num-layers 0: must be at least 1. Use 1 or more."),
        ("model.hidden_size", 0, "--hidden-size 0: must be at least 1. Use 1 or more."),
        (
            "parallel.tensor_model_parallel_size",
            0,
            "--tensor-model-parallel-size 0: must be at least 1. Use 1 or more.",
        ),
        ("training.micro_batch_size", -1, "--micro-batch-size -1: must be at least 1. Use 1 or more."),
        ("model.hidden_dropout", 1.0, "--hidden-dropout 1.0: must be at least 0 and below 1. Use 0."),
        (
            "model.attention_dropout",
            -0.1,
            "--attention-dropout -0.1: must be at least 0 and below 1. Use 0.",
        ),
        ("model.rotary_percent", 0.0, "--rotary-percent 0.0: must be above 0 and at most 1. Use 1, for instance."),
        ("optimizer.adam_eps", 0.0, "--adam-eps 0.0: must be above 0. Use 1e-08, for instance."),
        ("optimizer.clip_grad", -1.0, "--clip-grad -1.0: must be at least 0. Use 0 or more."),
    ],
)
def test_a_value_out_of_its_range_is_one_problem(key: str, value: float, words: str) -> None:
    assert problems(1, **{key: value}) == [words]


def test_the_remedy_names_a_value_in_the_range() -> None:
    for key, allowed in RANGES.items():
        assert allowed.holds(float(remedy_of(key).split()[1].rstrip(".,"))), remedy_of(key)


def test_every_number_of_the_schema_has_a_range_that_holds_its_default() -> None:
    numbers = {key for key, field in FIELDS.items() if field.kind in (int, float, int | None, float | None)}
    assert numbers == set(RANGES)
    defaults = {key: FIELDS[key].default for key in RANGES if FIELDS[key].default is not None}
    assert [key for key, value in defaults.items() if not RANGES[key].holds(value)] == []


def test_range_ends() -> None:
    half_open = Range(0, 1, open_high=True)
    assert [half_open.holds(value) for value in (-1, 0, 0.5, 1)] == [False, True, True, False]
    assert [Range(0, open_low=True).holds(value) for value in (0, 1e-9)] == [False, True]


def test_all_problems_are_reported_at_once_with_where_the_values_came_from() -> None:
    config = config_with(
        parallel__tensor_model_parallel_size=3,
        parallel__sequence_parallel=False,
        data__mock_data=False,
        training__train_iters=None,
        model__num_layers=0,
    )
    config = with_settings(config, {"model.num_attention_heads": Setting(8, "recipes/x.yaml")})
    with pytest.raises(ConfigError) as error:
        resolve(config, 4)
    text = str(error.value)
    assert len(error.value.problems) == 6
    assert text.startswith("6 problems in the configuration:\n  - --num-layers 0")
    assert "--num-attention-heads 8 (recipes/x.yaml) is not divisible by --tensor-model-parallel-size 3" in text
    for words in ("world size 4", "--vocab-size 512 padded", "neither --data-path", "the length of training"):
        assert words in text


@given(st.data())
def test_no_values_whatever_crash_the_rules(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(RANGES)), unique=True, max_size=6))
    changes = {key: data.draw(st.integers(-3, 40)) for key in keys}
    world = data.draw(st.one_of(st.none(), st.integers(1, 8)))
    found = problems(world, **changes)
    assert all(problem.endswith(".") for problem in found)
    assert len(set(found)) == len(found)


def test_showing_a_setting() -> None:
    config = RunConfig(origins={"data.mock_data": "flag --mock-data", "optimizer.lr": "recipes/x.yaml"})
    assert show(config, "optimizer.lr") == "--lr 0.0003 (recipes/x.yaml)"
    assert show(config, "data.mock_data") == "--no-mock-data"
    assert show(config, "training.seed") == "--seed 1234"
