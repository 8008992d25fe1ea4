"""Settings of recomputation: what is derived, Megatron's spellings, and every combination that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megazero.base.errors import ConfigError
from megazero.config.derive import derive
from megazero.config.flags import parse_run_config
from megazero.config.rules import find_problems
from megazero.config.schema import RecomputeConfig
from tests.config.settings import config_with

TP2 = {"parallel__tensor_model_parallel_size": 2}
FULL = {"recompute__recompute_granularity": "full"}
SELECTIVE = {"recompute__recompute_granularity": "selective"}


def problems(world: int = 1, **changes: Any) -> list[str]:
    return find_problems(derive(config_with(**changes), world), world)


def test_full_alone_recomputes_each_block() -> None:
    filled = derive(config_with(**FULL), 1)
    assert (filled.recompute.recompute_method, filled.recompute.recompute_num_layers) == ("uniform", 1)
    assert filled.origins["recompute.recompute_method"] == "derived: every block"
    assert filled.origins["recompute.recompute_num_layers"] == "derived: one block at a time"


@pytest.mark.parametrize("granularity", [{}, SELECTIVE])
def test_otherwise_nothing_is_derived(granularity: dict[str, str]) -> None:
    recompute = derive(config_with(**granularity), 1).recompute
    assert recompute.recompute_method is None and recompute.recompute_num_layers is None


SOUND: list[tuple[int, dict[str, Any]]] = [
    (1, {**FULL, "recompute__recompute_method": "block", "recompute__recompute_num_layers": 12}),
    (1, {**FULL, "recompute__recompute_num_layers": 5}),  # 12 layers: chunks of 5, 5 and 2
    (1, {**SELECTIVE, "recompute__recompute_modules": ("mlp", "layernorm")}),
    (1, {**SELECTIVE, "training__compile": True}),
    (1, {**FULL, "recompute__cpu_checkpointing": True, "recompute__contiguous_memory_optimization": True}),
    (2, {**FULL, **TP2, "recompute__partition_activations": True, "parallel__sequence_parallel": False}),
]


@pytest.mark.parametrize(("world", "changes"), SOUND)
def test_what_goes_together(world: int, changes: dict[str, Any]) -> None:
    assert problems(world, **changes) == []


REFUSED: list[tuple[int, dict[str, Any], list[str]]] = [
    (
        1,
        {"recompute__recompute_method": "block", "recompute__recompute_num_layers": 2},
        [
            "--recompute-method block is for recomputing whole blocks. Give --recompute-granularity full, "
            "or leave it out.",
            "--recompute-num-layers 2 is for recomputing whole blocks. Give --recompute-granularity full, "
            "or leave it out.",
        ],
    ),
    (
        1,
        {
            **SELECTIVE,
            "recompute__cpu_checkpointing": True,
            "recompute__contiguous_memory_optimization": True,
        },
        [
            "--cpu-checkpointing is for recomputing whole blocks, not --recompute-granularity selective. "
            "Give --recompute-granularity full, or leave it out.",
            "--contiguous-memory-optimization is for recomputing whole blocks, not --recompute-granularity selective. "
            "Give --recompute-granularity full, or leave it out.",
        ],
    ),
    (
        1,
        {"recompute__recompute_modules": ("mlp",)},
        [
            "--recompute-modules mlp is for recomputing parts of a block. Give --recompute-granularity selective, "
            "or leave it out."
        ],
    ),
    (
        1,
        {**FULL, "recompute__recompute_modules": ("mlp", "core_attn")},
        [
            "--recompute-modules mlp core_attn is for recomputing parts of a block, not --recompute-granularity full. "
            "Give --recompute-granularity selective, or leave it out."
        ],
    ),
    (
        1,
        {**SELECTIVE, "recompute__recompute_modules": ()},
        [
            "--recompute-granularity selective with an empty --recompute-modules recomputes nothing. "
            "Use --recompute-modules core_attn, or leave out --recompute-granularity."
        ],
    ),
    (
        1,
        {**SELECTIVE, "recompute__recompute_modules": ("layernorm",), "training__compile": True},
        [
            "--recompute-modules layernorm with --compile: layernorm's output is let go between two operations, which "
            "would break a compiled block apart. Leave layernorm out, or use --no-compile."
        ],
    ),
    (
        1,
        {**FULL, "recompute__recompute_num_layers": 13},
        [
            "--recompute-num-layers 13 is more than --num-layers 12 (default). Use --recompute-num-layers 12 or less.",
        ],
    ),
    (
        1,
        {**FULL, "recompute__recompute_num_layers": 0},
        ["--recompute-num-layers 0: must be at least 1. Use 1 or more."],
    ),
    (
        1,
        {**FULL, "recompute__partition_activations": True},
        [
            "--partition-activations divides between tensor-parallel ranks, and --tensor-model-parallel-size 1 "
            "(default). Use --tensor-model-parallel-size 2 or more, or leave it out."
        ],
    ),
    (
        2,
        {**FULL, **TP2, "recompute__partition_activations": True},
        [
            "--partition-activations has nothing to divide: under sequence parallelism (on by default with "
            "--tensor-model-parallel-size 2) each tensor-parallel rank holds its own part of the inputs already. "
            "Leave it out, or give --no-sequence-parallel."
        ],
    ),
]


@pytest.mark.parametrize(("world", "changes", "messages"), REFUSED)
def test_what_is_refused(world: int, changes: dict[str, Any], messages: list[str]) -> None:
    assert problems(world, **changes) == messages


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--recompute-activations", RecomputeConfig("selective")),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
            RecomputeConfig("full", recompute_method="block", recompute_num_layers=2),
        ),
        (
            "--recompute-granularity=selective --recompute_modules mlp layernorm",
            RecomputeConfig("selective", ("mlp", "layernorm")),
        ),
        (
            "--recompute-granularity full --distribute-saved-activations",
            RecomputeConfig("full", partition_activations=True),
        ),
    ],
)
def test_megatrons_spellings(words: str, wanted: RecomputeConfig) -> None:
    assert parse_run_config(words.split()).recompute == wanted


def test_a_misspelt_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected one of core_attn, mlp, layernorm, got 'core_atn'\. Did you mean"):
        parse_run_config(["--recompute-modules", "mlp", "core_atn"])


def test_megatron_s_alias_contradicts_full() -> None:
    with pytest.raises(ConfigError, match="contradict each other; give one"):
        parse_run_config(["--recompute-activations", "--recompute-granularity", "full"])
