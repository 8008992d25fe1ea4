"""The rules of a pipeline: each message with the nearest layout that works, and that this layout then works."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazero.config.derive import derive
from megazero.config.rules import find_problems
from megazero.parallel.schedule_table import schedule_table
from tests.config.settings import config_with


def problems(world: int | None = 4, **changes: Any) -> list[str]:
    """12 layers; plain keys are of the `parallel` section."""
    settings = {key if "__" in key else f"parallel__{key}": value for key, value in changes.items()}
    settings = {"training__global_batch_size": 16, **settings}
    return find_problems(derive(config_with(**settings), world), world)


PP = "pipeline_model_parallel_size"
LAYOUT = "pipeline_model_parallel_layout"
VIRTUAL = "num_virtual_stages_per_pipeline_rank"
EACH = "num_layers_per_virtual_pipeline_stage"
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"

CASES: list[tuple[dict[str, Any], str]] = [
    ({PP: 4}, ""),
    ({PP: 1, "pipeline_schedule": "1f1b", VIRTUAL: 1}, ""),
    (
        {"pipeline_schedule": "zbv"},
        "--pipeline-schedule zbv needs a pipeline, not --pipeline-model-parallel-size 1 (default). "
        "Use 2 or more, or use --pipeline-schedule 1f1b.",
    ),
    (
        {FIRST: 3},
        "--decoder-first-pipeline-num-layers 3 needs a pipeline, not --pipeline-model-parallel-size 1 (default). "
        "Use 2 or more, or leave it out.",
    ),
    (
        {PP: 2, VIRTUAL: 2, EACH: 3},
        "--num-virtual-stages-per-pipeline-rank 2 and --num-layers-per-virtual-pipeline-stage 3 both say how layers "
        "are cut. Give one.",
    ),
    (
        {PP: 2, LAYOUT: "Et*6|t*6L", LAST: 6},
        "--pipeline-model-parallel-layout Et*6|t*6L and --decoder-last-pipeline-num-layers 6 both say how layers are "
        "cut. Give one.",
    ),
    (
        {PP: 2, LAYOUT: "Et*4|t*4|t*4L"},
        "--pipeline-model-parallel-layout Et*4|t*4|t*4L has 3 stages, which is not a multiple of "
        "--pipeline-model-parallel-size 2: each rank holds equally many. Write 2 or 4 stages.",
    ),
    (
        {PP: 2, LAYOUT: "Et*4|t*4L"},
        "--pipeline-model-parallel-layout Et*4|t*4L has 8 layers t, and --num-layers 12 (default): each layer is in "
        "one stage. Write 12 of them, or use --num-layers 8.",
    ),
    (
        {PP: 2, LAYOUT: "Et|t"},
        "--pipeline-model-parallel-layout 'Et|t': the first stage begins with the embedding E, the last one ends with "
        "the loss L, and each is there once. Write it as in Et*3|t*4|t*4|t*3L.",
    ),
    (
        {PP: 2, EACH: 5},
        "--num-layers-per-virtual-pipeline-stage 5: --num-layers 12 (default) is not a multiple of it times "
        "--pipeline-model-parallel-size 2 = 10. Use --num-layers-per-virtual-pipeline-stage 3 or 6, or another "
        "--num-layers.",
    ),
    (
        {PP: 4, "model__num_layers": 3},
        "--num-layers 3 is less than the stages: --pipeline-model-parallel-size 4 times 1 on each rank = 4, and each "
        "holds a layer. Use --pipeline-model-parallel-size 3.",
    ),
    (
        {PP: 4, VIRTUAL: 4},
        "--num-layers 12 (default) is less than the stages: --pipeline-model-parallel-size 4 times 4 on each rank = "
        "16, and each holds a layer. Use --pipeline-model-parallel-size 3, or --num-virtual-stages-per-pipeline-rank "
        "3.",
    ),
    (
        {PP: 4, FIRST: 6, LAST: 5},
        "--decoder-first-pipeline-num-layers 6 and --decoder-last-pipeline-num-layers 5 leave 1 of --num-layers 12 "
        "(default): the 2 other stages hold at least one each. Make them at most 10 together.",
    ),
    (
        {PP: 2, FIRST: 6, LAST: 5},
        "--decoder-first-pipeline-num-layers 6 and --decoder-last-pipeline-num-layers 5 leave 1 of --num-layers 12 "
        "(default): there is no other stage to hold them. Make them 12 together.",
    ),
    ({PP: 2, FIRST: 6, LAST: 6}, ""),
    (
        {PP: 2, "pipeline_schedule": "zbv", VIRTUAL: 3},
        "--pipeline-schedule zbv with 3 stages on each rank: tokens go down the ranks and up again, so each holds "
        "exactly 2. Use --num-virtual-stages-per-pipeline-rank 2.",
    ),
    (
        {PP: 2, "pipeline_schedule": "interleaved-1f1b", VIRTUAL: 1},
        "--pipeline-schedule interleaved-1f1b with 1 stage on each rank: nothing to interleave. "
        "Use --num-virtual-stages-per-pipeline-rank 2 or more, or --pipeline-schedule 1f1b.",
    ),
    (
        {PP: 2, "pipeline_schedule": "gpipe", VIRTUAL: 2},
        "--pipeline-schedule gpipe with 2 stages on each rank: it knows one stage a rank. "
        "Use --pipeline-schedule interleaved-1f1b, or --num-virtual-stages-per-pipeline-rank 1.",
    ),
    (
        {PP: 4, "training__global_batch_size": 3},
        "--global-batch-size 3 makes 3 micro-batches of 1 on each of 1 replica, and --pipeline-schedule 1f1b (derived: "
        "from the number of virtual stages) with 4 stages needs at least as many as stages. Use --global-batch-size 4, "
        "or --pipeline-schedule gpipe.",
    ),
    (
        {PP: 4, "pipeline_schedule": "dualpipev", "training__global_batch_size": 6},
        "--global-batch-size 6 makes 6 micro-batches of 1 on each of 1 replica, and --pipeline-schedule dualpipev with "
        "8 stages (two on each rank) needs at least as many as stages. Use --global-batch-size 8, or "
        "--pipeline-schedule gpipe.",
    ),
    (
        {PP: 2, VIRTUAL: 2, "training__global_batch_size": 10},
        "--global-batch-size 10 makes 5 micro-batches of 1 on each of 2 replicas, and --pipeline-schedule "
        "interleaved-1f1b (derived: from the number of virtual stages) runs 2 rounds of at least "
        "--pipeline-model-parallel-size 2: they must be equally long. Use --global-batch-size 8 or 12.",
    ),
    (
        {PP: 4, "pipeline_schedule": "zbv", "training__compile": True},
        "--compile with --pipeline-schedule zbv: it runs each backward in two halves, which compiled blocks cannot. "
        "Use --no-compile, or --pipeline-schedule 1f1b.",
    ),
]


@pytest.mark.parametrize(("changes", "problem"), CASES)
def test_rule_and_message(changes: dict[str, Any], problem: str) -> None:
    assert problems(**changes) == ([problem] if problem else [])


def test_before_the_number_of_ranks_is_known_the_batch_waits() -> None:
    assert problems(None, **{PP: 4, "training__global_batch_size": 3}) == []


@given(
    st.sampled_from(["1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv", "dualpipev"]),
    st.integers(2, 4),
    st.integers(1, 13),
)
def test_the_rules_about_micro_batches_are_torchs(schedule: str, pp: int, batches: int) -> None:
    found = problems(pp, **{PP: pp, "pipeline_schedule": schedule, "training__global_batch_size": batches})
    if schedule == "1f1b":
        assert bool(found) == (batches < pp)  # torch says so when it is run
        return
    try:
        schedule_table(schedule, pp, 2, batches)
        refused = False
    except ValueError:
        refused = True
    assert bool(found) == refused
