"""The cut of a model's layers into pipeline stages.

    cost of a layer = ½ · its share of the model's FLOPs + ½ · its share of the parameters

FLOPs are a micro-batch's time, parameters are memory and the optimizer's time; the embedding (parameters alone) and
the loss head (both) count in the stage that holds them. The default cut makes the most expensive stage as cheap as
contiguous layers allow and, among such cuts, the stages as even as possible; a layout string, the layers of the first
and last stage, or a number of layers per stage replace it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megazero.config.layout import padded_vocab_size
from megazero.config.pipeline import parse_layout, place_of
from megazero.config.schema import RunConfig, TransformerConfig
from megazero.plan.flops import flops_per_token, parameter_count


@dataclass(frozen=True)
class StageCut:
    """One stage of the pipeline."""

    stage: int
    """Number of the stage, in the order in which a token meets them."""
    rank: int
    """Position on the pp axis of the ranks that hold it."""
    virtual: int
    """Which of that rank's stages it is."""
    start: int
    """First layer."""
    stop: int
    """Layer after the last."""
    has_embedding: bool
    has_loss: bool
    """The stage holds the last norm and the output projection."""
    parameters: int
    """Parameters over all tp ranks, embedding rows without padding; a tied projection counts in both stages that hold
    it, once in one that holds both."""
    flops: float
    """Forward and backward FLOPs of one token."""
    cost: float
    """Share of the whole model; the costs of all stages sum to 1."""

    @property
    def layers(self) -> range:
        """The layers held here, by their logical numbers."""
        return range(self.start, self.stop)


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """Sizes of `parts` contiguous runs of items, each at least one item, whose largest sum of costs is smallest and,
    among those, whose sum of squares is smallest.

    Raises AssertionError when there are fewer items than parts (settings are checked before).
    """
    n = len(costs)
    assert 1 <= parts <= n, f"{n} items do not make {parts} parts"
    sums = [0.0, *itertools.accumulate(costs)]
    limit = _smallest_maximum(sums, parts) * (1 + 1e-9)
    # best[k][j]: least sum of squares of k parts over the first j items, none above the limit
    best = [[0.0] + [float("inf")] * n]
    came: list[list[int]] = []
    for _ in range(parts):
        row, origin = [float("inf")] * (n + 1), [0] * (n + 1)
        for j in range(1, n + 1):
            for i in range(j - 1, -1, -1):
                part = sums[j] - sums[i]
                if part > limit:
                    break
                if best[-1][i] + part * part < row[j]:
                    row[j], origin[j] = best[-1][i] + part * part, i
        best.append(row)
        came.append(origin)
    sizes, end = [], n
    for origin in reversed(came):
        sizes.append(end - origin[end])
        end = origin[end]
    return sizes[::-1]


def _smallest_maximum(sums: list[float], parts: int) -> float:
    """The least limit under which `parts` runs hold everything; `sums` are running sums from 0.

    As many items as there are parts never fail a limit for having too few: a run of several items can be split.
    """
    candidates = sorted({b - a for a, b in itertools.combinations(sums, 2)})

    def holds(limit: float) -> bool:
        start, used = 0, 0
        while start < len(sums) - 1 and used <= parts:
            stop = bisect.bisect_right(sums, sums[start] + limit * (1 + 1e-12)) - 1
            if stop <= start:
                return False
            start, used = stop, used + 1
        return used <= parts and start >= len(sums) - 1

    return candidates[bisect.bisect_left(candidates, True, key=holds)]


def uniform(items: int, parts: int) -> list[int]:
    """Sizes of `parts` contiguous runs that differ by one item at most, the larger ones first."""
    each, more = divmod(items, parts)
    return [each + (index < more) for index in range(parts)]


def cut_layers(config: RunConfig) -> tuple[StageCut, ...]:
    """Every stage of the pipeline in token order; one stage that holds the whole model without a pipeline.

    `config` is resolved.
    """
    parallel = config.parallel
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    assert virtual is not None and parallel.pipeline_schedule is not None, "resolve the configuration first"
    costs = _Costs(config.model, config.data.seq_length)
    sizes, last, stages, start = _sizes(config, costs, pp * virtual), pp * virtual - 1, [], 0
    for index, size in enumerate(sizes):
        place = place_of(index, pp, parallel.pipeline_schedule)
        parts = [*[costs.layer] * size, *[costs.embedding] * (index == 0), *[costs.head(index == 0)] * (index == last)]
        parameters, flops = sum(part[0] for part in parts), sum(part[1] for part in parts)
        share = costs.share(parameters, flops)
        stages.append(
            StageCut(index, *place, start, start + size, index == 0, index == last, int(parameters), flops, share)
        )
        start += size
    total = sum(stage.cost for stage in stages)  # above 1 where tied weights are held twice
    return tuple(replace(stage, cost=stage.cost / total) for stage in stages)


def describe_cut(cut: Sequence[StageCut]) -> str:
    """The cut as lines of text, one for each stage; the first line names the balance."""
    most, mean = max(stage.cost for stage in cut), sum(stage.cost for stage in cut) / len(cut)
    lines = [f"pipeline: {len(cut)} stages, the most expensive one costs {most / mean:.3f} of the mean"]
    for stage in cut:
        held = [f"layers {stage.start}-{stage.stop - 1} ({len(stage.layers)})"] if stage.layers else []
        held = ["embedding"] * stage.has_embedding + held + ["loss head"] * stage.has_loss
        lines.append(
            f"  stage {stage.stage:>2} on pp rank {stage.rank:>2}: {' + '.join(held)}, "
            f"{stage.parameters / 1e6:,.1f} M parameters, {stage.cost:.1%} of the cost"
        )
    return "\n".join(lines)


class _Costs:
    """(parameters, FLOPs of a token) of the model's parts."""

    def __init__(self, model: TransformerConfig, seq_length: int) -> None:
        assert model.vocab_size is not None
        self.model = model
        self.total = float(parameter_count(model)), flops_per_token(model, seq_length)
        h, rows = model.hidden_size, model.vocab_size
        self.tied = not model.untie_embeddings_and_output_weights
        norm = h * (2 if model.normalization == "LayerNorm" else 1)
        positions = (model.max_position_embeddings or 0) * h * (model.position_embedding_type == "learned_absolute")
        layers = self.total[0] - norm - positions - rows * h * (1 if self.tied else 2)
        padded = padded_vocab_size(rows, model.make_vocab_size_divisible_by)
        head_flops = 3.0 * 2 * h * padded
        self.layer = layers / model.num_layers, (self.total[1] - head_flops) / model.num_layers
        self.embedding = float(rows * h + positions), 0.0
        self._head = float(rows * h + norm), head_flops
        self._norm = float(norm), head_flops

    def head(self, beside_embedding: bool) -> tuple[float, float]:
        """The last norm and the output projection."""
        return self._norm if self.tied and beside_embedding else self._head

    def share(self, parameters: float, flops: float) -> float:
        return (parameters / self.total[0] + flops / self.total[1]) / 2


def _sizes(config: RunConfig, costs: _Costs, stages: int) -> list[int]:
    """Layers of each stage."""
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.pipeline_model_parallel_layout is not None:
        return [stage.layers for stage in parse_layout(parallel.pipeline_model_parallel_layout)]
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        return uniform(layers, stages)
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    one = costs.share(*costs.layer)
    between = [one] * (layers - (first or 0) - (last or 0))
    if first is None and between:
        between[0] += costs.share(*costs.embedding)
    if last is None and between:
        between[-1] += costs.share(*costs.head(stages == 1))
    free = stages - (first is not None) - (last is not None)
    middle = balanced(between, free) if free else []
    return [*([first] if first is not None else []), *middle, *([last] if last is not None else [])]
