"""The pipeline's whole numbers: places of stages as torch has them, layout strings, virtual stages, micro-batches."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from megazero.base.errors import ConfigError
from megazero.config.derive import derive
from megazero.config.pipeline import StageLayout, micro_batches, parse_layout, place_of
from tests.config.settings import config_with


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_places_are_torchs(pp: int, virtual: int) -> None:
    stages = range(pp * virtual)
    loop = generate_stage_to_rank_mapping(pp, pp * virtual)
    assert {stage: place_of(stage, pp, "interleaved-1f1b").rank for stage in stages} == loop
    turned = generate_stage_to_rank_mapping(pp, pp * virtual, style="v")
    assert {stage: place_of(stage, pp, "zbv").rank for stage in stages} == turned
    for schedule in ("1f1b", "dualpipev"):
        assert [place_of(stage, pp, schedule).virtual for stage in stages] == [stage // pp for stage in stages]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("Et*3|t*4|t*4|t*3L", [3, 4, 4, 3]),
        ("E|tt|L", [0, 2, 0]),
        ("Et, t | t t L", [2, 2]),
        ("E(t|)*3L", [1, 1, 1, 0]),
        ("E(tt|)*2t*3L", [2, 2, 3]),
        ("E((t)*2|)*2(t)*1L", [2, 2, 1]),
        ("EtL", [1]),
    ],
)
def test_layouts(text: str, layers: list[int]) -> None:
    stages = parse_layout(text)
    assert [stage.layers for stage in stages] == layers
    assert [stage.has_embedding for stage in stages] == [True] + [False] * (len(layers) - 1)
    assert [stage.has_loss for stage in stages] == [False] * (len(layers) - 1) + [True]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.booleans())
def test_a_written_layout_reads_back(layers: list[int], short: bool) -> None:
    stages = [f"t*{count}" if short else "t" * count for count in layers]
    found = parse_layout("E" + "|".join(stages) + "L")
    assert list(found) == [
        StageLayout(count, index == 0, index == len(layers) - 1) for index, count in enumerate(layers)
    ]


ENDS = (
    "the first stage begins with the embedding E, the last one ends with the loss L, and each is there once. "
    "Write it as in Et*3|t*4|t*4|t*3L."
)
LETTERS = "is not E, t, L, |, a bracket or a repeat such as *3. Write it as in Et*3|t*4|t*4|t*3L."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t|tL", ENDS),
        ("Et|t", ENDS),
        ("tE|tL", ENDS),
        ("Et|L|t", ENDS),
        ("E*2t|tL", ENDS),
        ("", ENDS),
        ("|EtL", ENDS),
        ("Et||tL", "stage 1 holds nothing. Give it a layer t, or leave out one of the bars."),
        ("Em|tL", f"'m' at character 2 {LETTERS}"),
        ("Et)|tL", f"')' at character 3 {LETTERS}"),
        ("Et*|tL", f"'*' at character 3 {LETTERS}"),
        ("E*|tL", f"'*' at character 2 {LETTERS}"),
        ("*3Et|L", "'*3' at character 1 follows nothing that it could repeat. Write it as in Et*3|t*4|t*4|t*3L."),
        ("Et*3*4|L", "'*4' at character 5 follows nothing that it could repeat. Write it as in Et*3|t*4|t*4|t*3L."),
        ("Et*999999|L", "'*999999' at character 3 makes more than 100000 parts. Write it as in Et*3|t*4|t*4|t*3L."),
        ("E(t|tL", "a bracket is not closed. Write it as in E(tt|)*3t*2L."),
    ],
)
def test_bad_layouts_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_layout(text)
    assert str(error.value) == f"--pipeline-model-parallel-layout {text!r}: {message}"


@given(st.text("EtL|*()3, ", max_size=12))
def test_no_text_whatever_crashes(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_layout(text)


@pytest.mark.parametrize(
    ("changes", "virtual", "schedule"),
    [
        ({}, 1, "1f1b"),
        ({"pipeline_model_parallel_size": 2}, 1, "1f1b"),
        ({"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3}, 3, "interleaved-1f1b"),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3}, 2, "interleaved-1f1b"),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 6}, 1, "1f1b"),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 5}, None, "1f1b"),
        ({"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"}, 2, "zbv"),
        ({"pipeline_model_parallel_size": 2, "pipeline_schedule": "gpipe"}, 1, "gpipe"),
        ({"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved-1f1b"}, 2, "interleaved-1f1b"),
        ({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E(t|)*3t*9L"}, 2, "interleaved-1f1b"),
        ({"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "E(t|)*3t*9L"}, None, "1f1b"),
        ({"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "nonsense"}, None, "1f1b"),
    ],
)
def test_what_is_derived(changes: dict[str, Any], virtual: int | None, schedule: str) -> None:
    filled = derive(config_with(**{f"parallel__{key}": value for key, value in changes.items()}), 6).parallel
    assert (filled.num_virtual_stages_per_pipeline_rank, filled.pipeline_schedule) == (virtual, schedule)


def test_micro_batches_of_a_step() -> None:
    config = config_with(training__global_batch_size=24, training__micro_batch_size=2)
    assert [micro_batches(config, dp) for dp in (1, 2, 3, 5)] == [12, 6, 4, None]
    assert micro_batches(config_with(), 1) is None
