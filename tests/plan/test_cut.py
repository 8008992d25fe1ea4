"""The cut into stages: every layer once, the loads even, and each setting that overrides it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.config.validate import resolve
from megazero.plan.cut import balanced, cut_layers, describe_cut, uniform
from megazero.plan.flops import flops_per_token, parameter_count
from tests.config.settings import config_with


def cut(pp: int, **changes: Any) -> Any:
    """Stages of the small configuration: 12 layers, and enough micro-batches for every schedule."""
    settings = {"parallel__pipeline_model_parallel_size": pp, "training__global_batch_size": 4 * pp} | changes
    return cut_layers(resolve(config_with(**settings), pp))


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=9), st.data())
def test_balanced_is_the_best_of_all_cuts(costs: list[float], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    sizes = balanced(costs, parts)
    assert len(sizes) == parts and sum(sizes) == len(costs) and min(sizes) >= 1

    def loads(bounds: tuple[int, ...]) -> list[float]:
        return [sum(costs[a:b]) for a, b in itertools.pairwise((0, *bounds, len(costs)))]

    every = [loads(bounds) for bounds in itertools.combinations(range(1, len(costs)), parts - 1)]
    mine = loads(tuple(itertools.accumulate(sizes[:-1])))
    least = min(max(load) for load in every)
    assert max(mine) == pytest.approx(least, rel=1e-6, abs=1e-9)
    even = min(sum(x * x for x in load) for load in every if max(load) <= least * (1 + 1e-10))
    assert sum(x * x for x in mine) <= even * (1 + 1e-6) + 1e-12


@given(st.integers(1, 50), st.integers(1, 10))
def test_equal_costs_make_a_uniform_cut(items: int, parts: int) -> None:
    if parts <= items:
        assert sorted(balanced([1.0] * items, parts)) == sorted(uniform(items, parts))


def test_one_stage_holds_everything_without_a_pipeline() -> None:
    config = resolve(config_with(), 1)
    (stage,) = cut_layers(config)
    assert (stage.rank, stage.virtual, stage.layers) == (0, 0, range(12))
    assert stage.has_embedding and stage.has_loss and stage.cost == 1.0
    assert stage.parameters == parameter_count(config.model)
    assert stage.flops == pytest.approx(flops_per_token(config.model, config.data.seq_length))


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize(("pp", "virtual"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 3), (12, 1)])
def test_stages_hold_every_layer_once_and_sum_to_the_model(pp: int, virtual: int, untied: bool) -> None:
    model = resolve(config_with(model__untie_embeddings_and_output_weights=untied), 1).model
    stages = cut(
        pp,
        parallel__num_virtual_stages_per_pipeline_rank=virtual,
        model__untie_embeddings_and_output_weights=untied,
    )
    assert [layer for stage in stages for layer in stage.layers] == list(range(12))
    assert [stage.has_embedding for stage in stages] == [True] + [False] * (pp * virtual - 1)
    assert [stage.has_loss for stage in stages] == [False] * (pp * virtual - 1) + [True]
    assert sum(stage.cost for stage in stages) == pytest.approx(1.0)
    copy = 0 if untied else 512 * 64  # the tied projection's copy in the last stage
    assert sum(stage.parameters for stage in stages) == parameter_count(model) + copy
    assert sum(stage.flops for stage in stages) == pytest.approx(flops_per_token(model, 1024))


def test_cost_counts_embedding_and_loss_head() -> None:
    layers = [len(stage.layers) for stage in cut(4, model__vocab_size=32000)]
    assert layers == [1, 5, 5, 1]
    assert [len(stage.layers) for stage in cut(4, model__vocab_size=512)] == [3, 3, 3, 3]


def test_llama_405b_is_cut_as_its_authors_did() -> None:
    """One layer fewer on the first and the last of 16 stages (arXiv 2407.21783, section 3.3.2)."""
    stages = cut(16, model__preset="llama3.1-405b", model__num_layers=126, model__hidden_size=16384,
                 model__num_attention_heads=128, model__vocab_size=128256)  # fmt: skip
    assert [len(stage.layers) for stage in stages] == [7, *[8] * 14, 7]


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [("interleaved-1f1b", [0, 1, 0, 1]), ("interleaved-zero-bubble", [0, 1, 0, 1]), ("zbv", [0, 1, 1, 0]),
     ("dualpipev", [0, 1, 1, 0])],
)  # fmt: skip
def test_which_rank_holds_which_stage(schedule: str, ranks: list[int]) -> None:
    stages = cut(2, parallel__pipeline_schedule=schedule)
    assert [stage.rank for stage in stages] == ranks
    assert [stage.virtual for stage in stages] == [0, 0, 1, 1]
    assert [stage.stage for stage in stages] == [0, 1, 2, 3]


def test_settings_override_the_cut() -> None:
    def layers(**changes: Any) -> list[int]:
        return [len(stage.layers) for stage in cut(4, **{f"parallel__{key}": value for key, value in changes.items()})]

    assert layers(decoder_first_pipeline_num_layers=1)[0] == 1
    assert layers(decoder_last_pipeline_num_layers=5)[-1] == 5
    assert layers(decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=1) == [1, 5, 5, 1]
    assert layers(pipeline_model_parallel_layout="Et*2|t*5|(tt)*2|tL") == [2, 5, 4, 1]
    assert layers(pipeline_model_parallel_layout="E|t*6|t*6|L") == [0, 6, 6, 0]
    assert layers(num_layers_per_virtual_pipeline_stage=1) == [1] * 12
    assert layers(num_layers_per_virtual_pipeline_stage=3) == [3] * 4


def test_description_names_every_stage() -> None:
    text = describe_cut(cut(2, parallel__pipeline_model_parallel_layout="E|t*12L"))
    assert text.splitlines()[0].startswith("pipeline: 2 stages, the most expensive one costs 1.")
    assert text.splitlines()[1].startswith("  stage  0 on pp rank  0: embedding, 0.0 M parameters, ")
    assert text.splitlines()[2].startswith("  stage  1 on pp rank  1: layers 0-11 (12) + loss head, ")
