"""Activation formulas held to what the real model keeps between forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

from megazero.plan.activations import Activations
from megazero.plan.cut import cut_layers
from megazero.plan.schedule import Action
from tests.plan.measure import configuration, kept_bytes

LARGER: dict[str, Any] = {"model__hidden_size": 128, "model__vocab_size": 512, "data__seq_length": 256}

CASES: list[tuple[int, dict[str, Any], float]] = [
    (1, {}, 0.01),
    (1, {"training__precision": "fp32"}, 0.01),
    (1, {"model__activation": "gelu", "model__normalization": "LayerNorm", "model__hidden_dropout": 0.1}, 0.01),
    (1, {"model__activation": "squared_relu", "model__qk_layernorm": True}, 0.01),
    (1, {"model__position_embedding_type": "learned_absolute"}, 0.01),
    (1, {"model__attention_dropout": 0.1}, 0.05),
    (2, {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": False}, 0.01),
    (2, {"parallel__tensor_model_parallel_size": 2}, 0.05),
    (8, {"parallel__tensor_model_parallel_size": 8}, 0.15),
    (2, {"parallel__context_parallel_size": 2}, 0.01),
    (2, {"parallel__context_parallel_size": 2, "parallel__cp_comm_type": "a2a"}, 0.01),
    (8, {"parallel__context_parallel_size": 8, "parallel__cp_comm_type": "a2a"}, 0.01),
    (4, {"parallel__context_parallel_size": 2, "parallel__tensor_model_parallel_size": 2}, 0.05),
    (1, {"recompute__recompute_granularity": "full"}, 0.01),
    (1, {"recompute__recompute_granularity": "full", "recompute__recompute_num_layers": 3}, 0.01),
    (
        1,
        {
            "recompute__recompute_granularity": "full",
            "recompute__recompute_method": "block",
            "recompute__recompute_num_layers": 2,
        },
        0.01,
    ),
    (
        2,
        {
            "parallel__tensor_model_parallel_size": 2,
            "parallel__sequence_parallel": False,
            "recompute__recompute_granularity": "full",
            "recompute__partition_activations": True,
        },
        0.02,
    ),
    *(
        (
            2,
            {
                "parallel__tensor_model_parallel_size": 2,
                "recompute__recompute_granularity": "selective",
                "recompute__recompute_modules": modules,
            },
            0.1,
        )
        for modules in (("core_attn",), ("mlp",), ("layernorm",), ("mlp", "layernorm"), ("core_attn", "mlp"))
    ),
]


@pytest.mark.parametrize(("world", "changes", "tolerance"), CASES)
def test_what_a_micro_batch_keeps(world: int, changes: dict[str, Any], tolerance: float) -> None:
    config = configuration(world, **(LARGER | changes))
    (stage,) = cut_layers(config)
    assert Activations(config).kept(stage) == pytest.approx(kept_bytes(config, world), rel=tolerance)


def test_the_published_formula_for_a_gpt_block() -> None:
    """34·s·b·h less the masks (1 + 1) and, with flash attention, without scores: 10 of attention and norms become
    exact for full heads: 2 + 2 norms' inputs, 2 + 2 what they feed, 6 q k v, 2 result, 8 + 8 inside an MLP of 4h."""
    config = configuration(
        1,
        model__num_query_groups=8,
        model__activation="gelu",
        model__ffn_hidden_size=256,
        model__hidden_dropout=0.1,
    )
    block = Activations(config).block()
    sbh = 64 * 2 * 64
    scalars = 2 * 64 * (2 * 4 + 8 * 4)  # the norms' statistics, log-sum-exp of each head
    assert block.total - scalars == (34 + 2 - 2) * sbh


def test_peak_follows_the_schedule() -> None:
    config = configuration(2, parallel__pipeline_model_parallel_size=2, training__global_batch_size=8)
    first, last = cut_layers(config)
    formulas = Activations(config)
    batches = [(Action(0, "F", 0), 1), (Action(0, "F", 1), 2), (Action(0, "B", 0), 1)]
    found = formulas.peak([first], [action for action, _ in batches], 4)
    assert found["activations"] == 2 * formulas.kept(first)
    assert found["pipeline buffers"] == 4 * formulas.stream
    assert formulas.peak([last], [Action(1, "F", 0)], 4)["pipeline buffers"] == 4 * formulas.stream
    whole = configuration(1)
    assert "pipeline buffers" not in Activations(whole).peak(cut_layers(whole), [Action(0, "F", 0)], 4)


def test_working_memory_counts_what_is_recomputed() -> None:
    plain, full = (
        Activations(configuration(1, recompute__recompute_granularity=granularity)) for granularity in (None, "full")
    )
    (stage,) = cut_layers(configuration(1))
    assert full.working(stage) == plain.working(stage) + plain.block().total
