"""The same numbers on every layout: losses, gradients by logical name, clip norm and weights against one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.parity.compare import worst
from tests.parity.faults import FAULTS
from tests.parity.measure import Layout, Outcome, train

LAYOUTS = {
    "tp2": Layout(tp=2),
    "dp2": Layout(dp=2, zero=0),
    "dp2 zero1": Layout(dp=2),
    "tp2 dp2": Layout(tp=2, dp=2, zero=0),
    "tp2 dp2 zero1": Layout(tp=2, dp=2),
    "tp4": Layout(tp=4),  # two key/value heads: each is on two ranks
    "dp4 zero1": Layout(dp=4),
    "micro-batch 4": Layout(micro_batch=4),
    "dp2 zero1, no overlap": Layout(dp=2, overlap=False),
    "dp4 zero1, micro-batch 1": Layout(dp=4, micro_batch=1),
    "dp2 zero1, small buckets": Layout(dp=2, bucket_elements=1000),
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {
        "model.position_embedding_type": "learned_absolute",
        "model.normalization": "LayerNorm",
        "model.activation": "gelu_tanh",
        "model.add_bias_linear": True,
        "model.untie_embeddings_and_output_weights": False,
        "model.num_query_groups": 8,
    },
    "qwen": {"model.qk_layernorm": True, "model.add_qkv_bias": True, "packed": True, "model.num_query_groups": 1},
    "dropout": {"model.hidden_dropout": 0.2, "model.attention_dropout": 0.1, "model.activation": "squared_relu"},
    "weights on few rows": {"model.make_vocab_size_divisible_by": 256, "model.rotary_percent": 0.5},
}
# "weights on few rows": 100 tokens in 256 rows, so that tp 4 has ranks with padding only


@cache
def one_process(model: str) -> Outcome:
    outcome = train(Layout(), MODELS[model])
    assert outcome is not None
    return outcome


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_layout_equals_one_process(ranks: Any, layout: str, model: str) -> None:
    outcome = ranks.run(train, LAYOUTS[layout].world_size, LAYOUTS[layout], MODELS[model])[0]
    deviations = worst(one_process(model), outcome)
    assert max(deviations.values()) <= 1.0, deviations


def test_stages_agree_bitwise(ranks: Any) -> None:
    zero0 = ranks.run(train, 2, Layout(dp=2, zero=0))[0]
    zero1 = ranks.run(train, 2, Layout(dp=2, zero=1))[0]
    assert zero0.losses == zero1.losses
    assert all(bool((zero0.weights[name] == zero1.weights[name]).all()) for name in zero0.weights)


SEEN_ON = {name: Layout(tp=2, dp=2) for name in FAULTS} | {
    "copied_heads_not_summed": Layout(tp=4),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(ranks: Any, fault: str) -> None:
    layout = SEEN_ON[fault]
    outcome = ranks.run(train, layout.world_size, layout, {}, fault)[0]
    deviations = worst(one_process("llama"), outcome)
    assert max(deviations.values()) > 10.0, deviations
