"""A pipeline's whole numbers, for everyone who needs them before torch is there: stages, ranks, the layout string.

stages = pp · v (v virtual stages on each rank), numbered in the order in which a token meets them. pp = 2, v = 2:

    loop order (most schedules)  stage 0 1 2 3 on rank 0 1 0 1        V order (zbv, dualpipev)  on rank 0 1 1 0

The orders are those of torch.distributed.pipelining; the layout's syntax is Megatron-LM's
(core/transformer/pipeline_parallel_layer_layout.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from megazero.base.errors import ConfigError
from megazero.config.schema import ParallelConfig, RunConfig

V_SCHEDULES = ("zbv", "dualpipev")
"""Schedules in V order, with exactly two stages on each rank."""
LOOPED_SCHEDULES = ("interleaved-1f1b", "interleaved-zero-bubble")
"""Schedules in loop order that want several stages on each rank."""
SPLIT_BACKWARD_SCHEDULES = ("interleaved-zero-bubble", *V_SCHEDULES)
"""Schedules that run a backward in two halves: by input (I), then by weight (W)."""

_LONGEST_LAYOUT = 100_000  # letters and bars after repeats are written out: far above any real model


class Place(NamedTuple):
    """Where a stage runs."""

    rank: int
    """Position on the pp axis."""
    virtual: int
    """Which of the rank's stages it is, in token order."""


def place_of(stage: int, pp: int, schedule: str) -> Place:
    """The place of a stage, counted from 0."""
    virtual, position = divmod(stage, pp)
    turned = schedule in V_SCHEDULES and virtual % 2 == 1
    return Place(pp - 1 - position if turned else position, virtual)


def virtual_stages(parallel: ParallelConfig, num_layers: int) -> int | None:
    """Stages that each rank holds, by whichever setting says it; None when that setting makes no whole number."""
    pp, each = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if parallel.num_virtual_stages_per_pipeline_rank is not None:
        return parallel.num_virtual_stages_per_pipeline_rank
    if parallel.pipeline_model_parallel_layout is not None:
        try:
            items, size = len(parse_layout(parallel.pipeline_model_parallel_layout)), pp
        except ConfigError:
            return None
    elif each is not None:
        items, size = num_layers, pp * each
    else:
        return 2 if parallel.pipeline_schedule in (*V_SCHEDULES, *LOOPED_SCHEDULES) else 1
    return items // size if size > 0 and items > 0 and items % size == 0 else None


def micro_batches(config: RunConfig, dp: int) -> int | None:
    """Micro-batches of one step on each replica; None when the batch is not known or does not divide."""
    batch, each = config.training.global_batch_size, config.training.micro_batch_size * dp
    return batch // each if batch is not None and each > 0 and batch % each == 0 else None


@dataclass(frozen=True)
class StageLayout:
    """What a layout string gives one stage."""

    layers: int
    has_embedding: bool
    has_loss: bool


def parse_layout(text: str) -> tuple[StageLayout, ...]:
    """The stages of a layout such as `Et*3|(t|)*2t*4L`: E embedding, t layer, L loss, `x*n` and `(…)*n` repeat,
    `|` between stages; commas and blanks mean nothing.

    Raises ConfigError, naming the place, when it is not one, or when E is not first or L not last.
    """
    letters = _written_out(text)
    if letters.count("E") != 1 or letters.count("L") != 1 or letters[:1] != "E" or letters[-1:] != "L":
        raise ConfigError(
            f"--pipeline-model-parallel-layout {text!r}: the first stage begins with the embedding E, the last one "
            f"ends with the loss L, and each is there once. Write it as in Et*3|t*4|t*4|t*3L."
        )
    stages = tuple(StageLayout(part.count("t"), "E" in part, "L" in part) for part in letters.split("|"))
    for index, stage in enumerate(stages):
        if stage == StageLayout(0, False, False):
            raise ConfigError(
                f"--pipeline-model-parallel-layout {text!r}: stage {index} holds nothing. "
                f"Give it a layer t, or leave out one of the bars."
            )
    return stages


def _written_out(text: str) -> str:
    """The layout with its repeats written out, as letters and bars alone."""
    stack: list[str] = [""]  # what stands before each open bracket, and after the last
    last = ""  # the letter or group that a `*n` repeats
    for match in re.finditer(r"[\s,]+|\*\s*(\d+)|(.)", text):
        count, sign = match.groups()
        problem = None
        if count is not None:
            if not last:
                problem = "follows nothing that it could repeat"
            elif len(last) * int(count) > _LONGEST_LAYOUT:
                problem = f"makes more than {_LONGEST_LAYOUT} parts"
            else:
                stack[-1] = stack[-1].removesuffix(last) + last * int(count)
            last = ""
        elif sign == "(":
            stack.append("")
            last = ""
        elif sign == ")" and len(stack) > 1:
            last = stack.pop()
            stack[-1] += last
        elif sign is not None and sign in "EtL|":
            last = sign
            stack[-1] += sign
        elif sign is not None:
            problem = "is not E, t, L, |, a bracket or a repeat such as *3"
        if problem:
            raise ConfigError(
                f"--pipeline-model-parallel-layout {text!r}: {match.group().strip()!r} at character "
                f"{match.start() + 1} {problem}. Write it as in Et*3|t*4|t*4|t*3L."
            )
    if len(stack) > 1:
        raise ConfigError(
            f"--pipeline-model-parallel-layout {text!r}: a bracket is not closed. Write it as in E(tt|)*3t*2L."
        )
    return stack[0]
