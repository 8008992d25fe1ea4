"""The same numbers on every layout: losses, gradients by logical name, clip norm and weights against one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.parity.compare import worst
from tests.parity.faults import FAULTS
from tests.parity.measure import Layout, Outcome, train
from tests.parity.table import record_fault, record_layout

LAYOUTS = {
    "tp2": Layout(tp=2),
    "dp2": Layout(dp=2, zero=0),
    "dp2 zero1": Layout(dp=2),
    "tp2 dp2": Layout(tp=2, dp=2, zero=0),
    "tp2 dp2 zero1": Layout(tp=2, dp=2),
    "tp4": Layout(tp=4),  # two key/value heads: each is on two ranks
    "dp4 zero1": Layout(dp=4),
    "pp2 gpipe": Layout(pp=2, schedule="gpipe"),
    "pp2 1f1b": Layout(pp=2, schedule="1f1b"),
    "pp2 1f1b dp2 zero0": Layout(pp=2, schedule="1f1b", dp=2, zero=0),
    "pp2 1f1b dp2": Layout(pp=2, schedule="1f1b", dp=2),
    "pp2 tp2 sequence": Layout(pp=2, tp=2, sequence=True),
    "pp2 interleaved": Layout(pp=2, schedule="interleaved-1f1b", virtual=2),
    "pp2 interleaved zero bubble": Layout(pp=2, schedule="interleaved-zero-bubble", virtual=2),
    "pp2 zbv": Layout(pp=2, schedule="zbv"),
    "pp2 dualpipev": Layout(pp=2, schedule="dualpipev"),
    "pp4": Layout(pp=4),
    "tp2 sequence": Layout(tp=2, sequence=True),
    "tp2 dp2 sequence": Layout(tp=2, dp=2, sequence=True),
    "tp4 sequence": Layout(tp=4, sequence=True),
    "cp2 p2p": Layout(cp=2),
    "cp2 a2a": Layout(cp=2, cp_comm="a2a"),
    "cp4 p2p": Layout(cp=4),
    "cp4 a2a": Layout(cp=4, cp_comm="a2a"),  # two key/value heads: each is sent to two ranks
    "tp2 cp2 p2p": Layout(tp=2, cp=2),
    "tp2 cp2 a2a": Layout(tp=2, cp=2, cp_comm="a2a"),
    "tp2 cp2 p2p sequence": Layout(tp=2, cp=2, sequence=True),
    "tp2 cp2 a2a sequence": Layout(tp=2, cp=2, cp_comm="a2a", sequence=True),
    "cp2 p2p dp2 zero0": Layout(cp=2, dp=2, zero=0),
    "cp2 p2p dp2": Layout(cp=2, dp=2),
    "cp2 a2a dp2": Layout(cp=2, cp_comm="a2a", dp=2),
    "micro-batch 4": Layout(micro_batch=4),
    "dp2 zero1, no overlap": Layout(dp=2, overlap=False),
    "dp4 zero1, micro-batch 1": Layout(dp=4, micro_batch=1),
    "dp2 zero1, small buckets": Layout(dp=2, bucket_elements=1000),
    "dp4 zero2": Layout(dp=4, zero=2, micro_batch=1),
    "dp4 zero3": Layout(dp=4, zero=3, micro_batch=1),
    "dp2 zero3, small buckets": Layout(dp=2, zero=3, bucket_elements=1000),
    "dp2 zero2, no overlap": Layout(dp=2, zero=2, overlap=False),
    "tp2 dp2 zero2 sequence": Layout(tp=2, dp=2, zero=2, sequence=True),
    "tp2 dp2 zero3 sequence": Layout(tp=2, dp=2, zero=3, sequence=True),
    "pp2 dp2 zero2": Layout(pp=2, dp=2, zero=2),
    "pp2 dp2 zero3": Layout(pp=2, dp=2, zero=3),
    "pp2 interleaved dp2 zero3": Layout(pp=2, dp=2, zero=3, schedule="interleaved-1f1b", virtual=2),
    "cp2 p2p dp2 zero2": Layout(cp=2, dp=2, zero=2),
    "cp2 p2p dp2 zero3": Layout(cp=2, dp=2, zero=3),
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
def one_process(model: str, ring: bool = False) -> Outcome:
    outcome = train(Layout(), settings_of(model, ring))
    assert outcome is not None
    return outcome


def settings_of(model: str, ring: bool) -> dict[str, Any]:
    """The model's settings; a ring takes no attention dropout."""
    left_out = {"model.attention_dropout"} if ring else set()
    return {key: value for key, value in MODELS[model].items() if key not in left_out}


# test_drawn_layouts.py tries every axis alone and in pairs, on models it draws; of the full product, `make test` takes
# every model on the layouts where most comes together, and `make test-all` the rest.
ALWAYS = {
    "tp4",
    "tp2 dp2 zero1",
    "tp4 sequence",
    "pp2 1f1b dp2",
    "pp2 tp2 sequence",
    "pp2 zbv",
    "cp4 a2a",
    "tp2 cp2 p2p sequence",
    "dp4 zero3",
    "tp2 dp2 zero2 sequence",
    "tp2 dp2 zero3 sequence",
    "pp2 dp2 zero3",
    "cp2 p2p dp2 zero3",
}
SHARDED = {layout for layout in LAYOUTS if "zero2" in layout or "zero3" in layout}


def _always(layout: str, model: str) -> bool:
    if layout in SHARDED:
        return model == "llama" or (layout in ALWAYS and model in ("gpt2", "qwen"))
    return layout in ALWAYS


CASES = [
    pytest.param(layout, model, marks=[] if _always(layout, model) else pytest.mark.slow, id=f"{layout}-{model}")
    for model in MODELS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_layout_equals_one_process(ranks: Any, layout: str, model: str, record_property: Any) -> None:
    tried = LAYOUTS[layout]
    ring = tried.cp > 1 and tried.cp_comm == "p2p" and "model.attention_dropout" in MODELS[model]
    outcome = ranks.run(train, tried.world_size, tried, settings_of(model, ring))[0]
    deviations = worst(one_process(model, ring), outcome)
    record_layout(record_property, f"{layout}, {model}", deviations)
    assert max(deviations.values()) <= 1.0, deviations


def test_stages_agree_bitwise(ranks: Any) -> None:
    """All stages with one micro-batch a step. With more, stages 2 and 3 sum over ranks first, 0 and 1 last."""
    for stages, micro_batch in (((0, 1, 2, 3), 4), ((0, 1), 2), ((2, 3), 2)):
        first, *others = (ranks.run(train, 2, Layout(dp=2, zero=stage, micro_batch=micro_batch))[0] for stage in stages)
        for other in others:
            assert first.losses == other.losses, stages
            assert all(bool((first.weights[name] == other.weights[name]).all()) for name in first.weights), stages


SEEN_ON: dict[str, tuple[Layout, str]] = {name: (Layout(tp=2, dp=2), "llama") for name in FAULTS} | {
    "copied_heads_not_summed": (Layout(tp=4), "llama"),
    "sequence_gradients_not_summed": (Layout(tp=2, sequence=True), "llama"),
    "tied_ends_not_summed": (Layout(pp=2), "gpt2"),
    "micro_batches_averaged": (Layout(pp=2), "llama"),
    "ring_step_skipped": (Layout(cp=2), "llama"),
    "ring_merge_without_shares": (Layout(cp=2), "llama"),
    "ring_mask_in_wrong_order": (Layout(cp=2), "qwen"),
    "ring_key_gradients_dropped": (Layout(cp=2), "llama"),
    "exchange_in_rank_order": (Layout(cp=2, cp_comm="a2a"), "llama"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(ranks: Any, fault: str, record_property: Any) -> None:
    layout, model = SEEN_ON[fault]
    outcome = ranks.run(train, layout.world_size, layout, MODELS[model], fault)[0]
    deviations = worst(one_process(model), outcome)
    record_fault(record_property, fault, deviations)
    assert max(deviations.values()) > 10.0, deviations
