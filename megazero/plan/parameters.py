"""A rank's parameters, one by one, as the model registers them, and the buckets that ZeRO makes of them.

    unit        what stage 3 gathers as one: the embedding, each block, the last norm, the output head
    bucket      parameters of one unit in reverse order, up to a limit of elements (zero/buckets.py)

Sizes are those of one tp rank; whoever builds the model finds the same numbers (a test holds them together).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megazero.config.layout import padded_vocab_size
from megazero.config.schema import RunConfig, TransformerConfig
from megazero.plan.cut import StageCut

BUCKET_ELEMENTS = 40_000_000
"""Largest bucket without --ddp-bucket-size, as in zero/buckets.py."""


class Parameter(NamedTuple):
    """One parameter, the part of it that a tp rank has."""

    unit: str
    elements: int
    summed: str = ""
    """Ranks beside the ZeRO group's that sum its gradient: "tp" (each has a part of it), "copies" (key/value heads that
    several tp ranks share), "pp" (the embedding's rows on first and last stage)."""


class Bucket(NamedTuple):
    unit: str
    elements: int


def parameters(config: RunConfig, stages: Sequence[StageCut]) -> list[Parameter]:
    """Those of a rank that holds these stages, in the order of registration. `config` is resolved."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    assert model.vocab_size is not None
    whole = "tp" if config.parallel.sequence_parallel and tp > 1 else ""
    rows = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by) // tp * model.hidden_size
    first, last = any(stage.has_embedding for stage in stages), any(stage.has_loss for stage in stages)
    tied = not model.untie_embeddings_and_output_weights
    apart = "pp" if tied and first != last else ""
    found = []
    for stage in stages:
        if stage.has_embedding:
            if model.position_embedding_type == "learned_absolute":
                found.append(Parameter("", (model.max_position_embeddings or 0) * model.hidden_size, whole))
            found.append(Parameter("embedding", rows, apart))
        for layer in stage.layers:
            found += _block(f"layer {layer}", model, tp, whole)
        if stage.has_loss:
            found += _norm("norm", model, model.hidden_size, whole)
            if not (tied and first):
                found.append(Parameter("head", rows, apart))
    return found


def _block(unit: str, model: TransformerConfig, tp: int, whole: str) -> Iterator[Parameter]:
    assert model.kv_channels and model.num_query_groups and model.ffn_hidden_size
    h, d, ffn = model.hidden_size, model.kv_channels, model.ffn_hidden_size // tp
    q, kv = model.num_attention_heads * d // tp, max(model.num_query_groups // tp, 1) * d
    copies = "copies" if model.num_query_groups < tp else ""
    inward, outward = model.add_bias_linear or model.add_qkv_bias, model.add_bias_linear

    def linear(inputs: int, outputs: int, bias: int = 0, summed: str = "", of_bias: str = "") -> Iterator[Parameter]:
        yield Parameter(unit, inputs * outputs, summed)
        if bias:
            yield Parameter(unit, bias, of_bias)

    yield from _norm(unit, model, h, whole)
    yield from linear(h, q, q * inward)
    yield from linear(h, kv, kv * inward, copies, copies)
    yield from linear(h, kv, kv * inward, copies, copies)
    yield from linear(q, h, h * outward, of_bias=whole)
    if model.qk_layernorm:  # applied to each rank's own heads
        for _ in range(2):
            yield from _norm(unit, model, d, "tp" if tp > 1 else "")
    yield from _norm(unit, model, h, whole)
    for _ in range(2 if model.activation == "swiglu" else 1):
        yield from linear(h, ffn, ffn * outward)
    yield from linear(ffn, h, h * outward, of_bias=whole)


def _norm(unit: str, model: TransformerConfig, width: int, summed: str) -> list[Parameter]:
    return [Parameter(unit, width, summed)] * (2 if model.normalization == "LayerNorm" else 1)


def persistent(config: RunConfig, listed: Sequence[Parameter]) -> int:
    """Elements of parameters that stage 3 keeps whole on every rank: those smaller than the threshold."""
    threshold = config.parallel.stage3_param_persistence_threshold or 0
    return sum(parameter.elements for parameter in listed if parameter.elements < threshold)


def buckets(listed: Sequence[Parameter], limit: int | None) -> list[Bucket]:
    """The buckets, in the order in which backward fills them, without padding."""
    limit = limit or BUCKET_ELEMENTS
    sizes: list[tuple[str, int]] = []
    opened: dict[tuple[str, str], int] = {}
    for parameter in reversed(listed):
        key = (parameter.unit, parameter.summed)
        index = opened.get(key)
        if index is None or sizes[index][1] + parameter.elements > limit:
            opened[key] = index = len(sizes)
            sizes.append((parameter.unit, 0))
        sizes[index] = (parameter.unit, sizes[index][1] + parameter.elements)
    return [Bucket(*size) for size in sizes]
