"""What the settings of context parallelism must be together. The rules of `rules.py` on one axis; see there.

a rank's tokens: seq-length / cp, in two chunks of seq-length / (2 · cp)       its heads (a2a): heads / (tp · cp)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megazero.config.fields import flag_of
from megazero.config.layout import either, near_divisors, neighbours
from megazero.config.registry import Rules, show
from megazero.config.schema import RunConfig

CONTEXT_RULES = Rules()
_rule = CONTEXT_RULES.rule

_CP = "parallel.context_parallel_size"
_TP = "parallel.tensor_model_parallel_size"
_COMM = "parallel.cp_comm_type"
_HEADS = "model.num_attention_heads"
_SEQUENCE = "data.seq_length"
_DROPOUT = "model.attention_dropout"


@_rule(_CP, _TP, _SEQUENCE)
def _sequence_over_cp(config: RunConfig, world: int | None) -> Iterator[str]:
    cp, length = config.parallel.context_parallel_size, config.data.seq_length
    if cp == 1 or length % _sequence_unit(config, cp) == 0:
        return
    split = _tp_of_sequence(config) > 1
    shares = f", and tp = {_tp_of_sequence(config)} ranks share its tokens with {flag_of('parallel.sequence_parallel')}"
    sizes = [size for size in range(2, 2 * cp + 1) if length % _sequence_unit(config, size) == 0]
    near = [max(size for size in [1, *sizes] if size < cp), *[size for size in sizes if size > cp][:1]]
    yield (
        f"{show(config, _SEQUENCE)} is not divisible by {_sequence_unit(config, cp)} for {show(config, _CP)}: "
        f"each rank takes two of 2 · cp = {2 * cp} equal chunks{shares if split else ''}. "
        f"Use {flag_of(_SEQUENCE)} {either(neighbours(length, _sequence_unit(config, cp)))}, "
        f"or {flag_of(_CP)} {either(near)}."
    )


@_rule(_CP, _TP, _HEADS)
def _heads_over_cp(config: RunConfig, world: int | None) -> Iterator[str]:
    cp, tp = config.parallel.context_parallel_size, config.parallel.tensor_model_parallel_size
    heads = config.model.num_attention_heads
    if cp == 1 or config.parallel.cp_comm_type != "a2a" or heads % tp or heads % (tp * cp) == 0:
        return
    ring = f", or {flag_of(_COMM)} p2p" if not config.model.attention_dropout else ""
    yield (
        f"{show(config, _HEADS)} is not divisible by tp · cp = {tp} · {cp} = {tp * cp}: {show(config, _COMM)} gives "
        f"each rank whole heads. Use {flag_of(_CP)} {either(near_divisors(heads // tp, cp))}, "
        f"{flag_of(_HEADS)} {either(neighbours(heads, tp * cp))}{ring}."
    )


@_rule(_CP, _DROPOUT)
def _dropout_in_a_ring(config: RunConfig, world: int | None) -> Iterator[str]:
    parallel = config.parallel
    if parallel.context_parallel_size == 1 or parallel.cp_comm_type != "p2p" or not config.model.attention_dropout:
        return
    heads, ranks = (
        config.model.num_attention_heads,
        parallel.context_parallel_size * parallel.tensor_model_parallel_size,
    )
    exchange = f", or {flag_of(_COMM)} a2a" if heads % ranks == 0 else ""
    yield (
        f"{show(config, _DROPOUT)} with {show(config, _CP)} and {show(config, _COMM)}: a ring never has a row of "
        f"attention probabilities together to drop from. Use {flag_of(_DROPOUT)} 0{exchange}."
    )


def _tp_of_sequence(config: RunConfig) -> int:
    """Ranks over which sequence parallelism splits the tokens of a context-parallel rank."""
    return config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1


def _sequence_unit(config: RunConfig, cp: int) -> int:
    """What the sequence's length must be a multiple of."""
    return math.lcm(2 * cp, cp * _tp_of_sequence(config))
