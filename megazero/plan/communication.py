"""What one rank hands to the network in a step, by axis and operation, from a resolved configuration.

    on the wire, x bytes over N ranks:   all-reduce 2x(N-1)/N    reduce-scatter, all-gather, all-to-all x(N-1)/N

    tp   a block and micro-batch: 2 all-reduces of n·h forward and 2 backward (Shoeybi et al., arXiv 1909.08053); with
         sequence parallelism each is a reduce-scatter or an all-gather instead (Korthikanti et al., 2205.05198)
         embedding and loss head: one more each; three numbers per token and rank for the softmax
    pp   n·h to the next stage forward and to the one before backward, where that is another rank
    cp   p2p: keys and values cp - 1 times round, twice in backward's case with their fp32 gradients cp times
         (Liu et al., 2310.01889); a2a: queries, keys, values and result exchanged, forward and backward
         (Jacobs et al., 2309.14509)
    zero of P parameters, g micro-batches: gradients reduce-scattered once (stages 0, 1) or g times; stage 0 gathers
         them, 1 and 2 gather the weights, 3 gathers the weights for each forward and each backward: 2P, 2P, (g+1)P, 3gP
         (Rajbhandari et al., 1910.02054)

n = b · s/cp tokens; a send is what is sent. What is recomputed communicates again, but for the last operation of what
is recomputed as one. The padding of buckets and the few numbers that all ranks agree on (token counts, norms) are not
in it. Elements are those of the whole tensor, as parallel/traffic.py counts them: a test holds the formulas to its
counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from megazero.config.schema import RunConfig
from megazero.plan.cut import StageCut
from megazero.plan.memory import WEIGHT_BYTES, gradient_bytes, reused, wire_bytes
from megazero.plan.parameters import Parameter, persistent


class Volume(NamedTuple):
    """One operation on one axis, in one step, on one rank."""

    axis: str
    operation: str
    elements: float
    """Of the whole tensors, over all calls."""
    bytes: float
    """On the wire."""


_TIMES = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1, "all-to-all": 1}


class _Volumes:
    """Sums by axis and operation."""

    def __init__(self, element: int) -> None:
        self.element = element
        self.found: dict[tuple[str, str], tuple[float, float]] = {}

    def add(self, axis: str, operation: str, size: int, elements: float, width: int | None = None) -> None:
        """`width` bytes an element, by default the model's."""
        if elements <= 0 or size == 1:
            return
        share = 1.0 if operation == "send" else _TIMES[operation] * (size - 1) / size
        before = self.found.get((axis, operation), (0.0, 0.0))
        more = elements * (width or self.element) * share
        self.found[axis, operation] = before[0] + elements, before[1] + more


def communication(
    config: RunConfig,
    cut: Sequence[StageCut],
    pp_rank: int,
    listed: Sequence[Parameter],
    group: int,
    micro_batches: int,
) -> tuple[Volume, ...]:
    """What a rank at this position of the pp axis sends in a step.

    Args:
        listed: its parameters. group: ranks of its ZeRO group, dp · cp. micro_batches: of its replica in a step.
    """
    stages = [stage for stage in cut if stage.rank == pp_rank]
    volumes = _Volumes(WEIGHT_BYTES[config.training.precision])
    tokens = config.training.micro_batch_size * config.data.seq_length // config.parallel.context_parallel_size
    for stage in stages:
        _tensor_parallel(volumes, config, stage, micro_batches * tokens)
        _context_parallel(volumes, config, len(stage.layers), micro_batches * tokens)
        _pipeline(volumes, config, cut, stage, micro_batches * tokens)
    _zero(volumes, config, listed, group, micro_batches)
    return tuple(Volume(*key, *volumes.found[key]) for key in sorted(volumes.found))


def _tensor_parallel(volumes: _Volumes, config: RunConfig, stage: StageCut, tokens: int) -> None:
    tp, layers, recompute = config.parallel.tensor_model_parallel_size, len(stage.layers), config.recompute
    enter = leave = 2 * layers  # of the blocks, in forward: into attention and the MLP, and out of them
    enter_again, leave_again = _again(config, layers)
    hidden = tokens * config.model.hidden_size
    first, last = int(stage.has_embedding), int(stage.has_loss)
    if config.parallel.sequence_parallel:
        volumes.add("tp", "all-gather", tp, (enter + enter_again + last + leave + first) * hidden)
        volumes.add("tp", "reduce-scatter", tp, (leave + leave_again + first + enter + last) * hidden)
    else:
        volumes.add("tp", "all-reduce", tp, (leave + leave_again + first + enter + last) * hidden)
        if recompute.recompute_granularity == "full" and recompute.partition_activations:
            volumes.add("tp", "all-gather", tp, _chunks(config, layers)[0] * hidden)
    volumes.add("tp", "all-gather", tp, last * 3 * tp * tokens, 4)


def _chunks(config: RunConfig, layers: int) -> tuple[int, int]:
    """(pieces that full recomputation works in, blocks in them all) of a stage."""
    step = config.recompute.recompute_num_layers or 1
    if config.recompute.recompute_method == "block":
        return min(step, layers), min(step, layers)
    return math.ceil(layers / step), layers


def _again(config: RunConfig, layers: int) -> tuple[int, int]:
    """How often recomputation enters and leaves tensor parallelism a second time."""
    recompute = config.recompute
    if recompute.recompute_granularity == "full":
        pieces, blocks = _chunks(config, layers)
        return 2 * blocks, 2 * blocks - pieces
    modules = recompute.recompute_modules if recompute.recompute_granularity == "selective" else ()
    return layers * (2 if "layernorm" in modules else 1 if "mlp" in modules else 0), 0


def _context_parallel(volumes: _Volumes, config: RunConfig, layers: int, tokens: int) -> None:
    parallel, model, recompute = config.parallel, config.model, config.recompute
    assert model.kv_channels and model.num_query_groups
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads // tp, max(model.num_query_groups // tp, 1)
    full = recompute.recompute_granularity == "full"
    blocks_again = _chunks(config, layers)[1] if full else 0
    if recompute.recompute_granularity == "selective" and "core_attn" in recompute.recompute_modules:
        blocks_again = layers
    if parallel.cp_comm_type == "p2p":
        pair = 2 * tokens * groups * model.kv_channels
        volumes.add("cp", "send", cp, (2 * layers + blocks_again) * (cp - 1) * pair)
        volumes.add("cp", "send", cp, layers * cp * pair, 4)
        return
    copies = cp // math.gcd(groups, cp)
    inward, outward = (heads + 2 * groups * copies) * model.kv_channels, heads * model.kv_channels
    times = 2 * layers + blocks_again
    volumes.add("cp", "all-to-all", cp, tokens * (times * inward + (times if full else 2 * layers) * outward))


def _pipeline(volumes: _Volumes, config: RunConfig, cut: Sequence[StageCut], stage: StageCut, tokens: int) -> None:
    split = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    hidden = tokens * config.model.hidden_size / split
    neighbours = [cut[number] for number in (stage.stage - 1, stage.stage + 1) if 0 <= number < len(cut)]
    elsewhere = [neighbour for neighbour in neighbours if neighbour.rank != stage.rank]
    volumes.add("pp", "send", 2, len(elsewhere) * hidden)


def _zero(volumes: _Volumes, config: RunConfig, listed: Sequence[Parameter], group: int, batches: int) -> None:
    """Stage s over g micro-batches, each × (N-1)/N: 0: P + P (an all-reduce), 1: P + P, 2: gP + P, 3: gP + 2gP."""
    stage, elements = config.parallel.zero_stage, sum(parameter.elements for parameter in listed)
    gradient, wire = gradient_bytes(config), wire_bytes(config)
    volumes.add("zero", "reduce-scatter", group, elements * (batches if stage >= 2 else 1), wire)
    if stage == 0:
        volumes.add("zero", "all-gather", group, elements, gradient)
    elif stage < 3:
        volumes.add("zero", "all-gather", group, elements)
    else:
        whole = persistent(config, listed)  # gathered once, after the step
        volumes.add("zero", "all-gather", group, whole + batches * _gathered(config, listed))
    tp, groups = config.parallel.tensor_model_parallel_size, config.model.num_query_groups or 1
    for axis, size, summed in (("tp", tp, "tp"), ("tp", max(tp // groups, 1), "copies"), ("pp", 2, "pp")):
        volumes.add(axis, "all-reduce", size, _summed(listed, summed) / group, gradient)


def _gathered(config: RunConfig, listed: Sequence[Parameter]) -> int:
    """Elements that stage 3 gathers in one micro-batch: for forward and again for backward, but for the embedding's
    rows, which no backward reads, and the head's, whose gradients this model computes in forward. A tied embedding is
    gathered for both of its uses in forward."""
    threshold = config.parallel.stage3_param_persistence_threshold or 0
    kept = reused(config, listed)
    tied = not config.model.untie_embeddings_and_output_weights and any(p.unit == "norm" for p in listed)
    found = 0
    for parameter in listed:
        if parameter.elements < threshold:
            continue
        ends = parameter.unit in ("embedding", "head", "")
        found += parameter.elements * (
            1 + (tied and parameter.unit == "embedding" if ends else parameter.unit not in kept)
        )
    return found


def _summed(listed: Sequence[Parameter], ranks: str) -> int:
    return sum(parameter.elements for parameter in listed if parameter.summed == ranks)
