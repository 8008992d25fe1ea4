"""Bytes on one rank, component by component, from a resolved configuration.

Parameters, of P elements on a rank (its stages, its part over tp), N = dp · cp ranks in the ZeRO group:

    bytes a parameter      bf16 weights   fp32 gradients   fp32 master   Adam's m, v        together
    ZeRO 0                 2              4                4             8                  18
    ZeRO 1                 2              4                4/N           8/N                6 + 12/N
    fp32 weights, ZeRO 1   4              4                (the weights) 8/N                8 + 8/N     (ZeRO 0: 16)

(Rajbhandari et al., arXiv 1910.02054, with fp32 gradients; what zero/buckets.py allocates.) Activations are formulas
in `plan/activations.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megazero.config.layout import padded_vocab_size
from megazero.config.schema import RunConfig, TransformerConfig
from megazero.plan.cut import StageCut

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "auto": 2}
"""By precision; auto is planned as on a GPU."""


@dataclass(frozen=True)
class LocalParameters:
    """Elements of one rank's parameters."""

    elements: int
    """All of them, without the padding of buckets."""
    summed_over_tp: int
    """Those that every tp rank holds whole and computes a part of the gradient of."""
    copied_over_tp: int
    """Key/value heads that some tp ranks share, being fewer than these; they sum their gradients."""
    tied_to_other_stage: int
    """The embedding's rows that are held by the first and the last stage and whose gradients the two sum."""


def local_parameters(config: RunConfig, stages: Sequence[StageCut]) -> LocalParameters:
    """What a rank that holds these stages has. `config` is resolved."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    block = _block(model, tp, bool(config.parallel.sequence_parallel))
    layers = sum(len(stage.layers) for stage in stages)
    elements, summed, copied = (layers * number for number in block)
    first, last = any(stage.has_embedding for stage in stages), any(stage.has_loss for stage in stages)
    assert model.vocab_size is not None
    rows = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by) // tp * model.hidden_size
    tied = not model.untie_embeddings_and_output_weights
    elements += rows * (first + last - (tied and first and last))
    whole = _norm(model, model.hidden_size) if last else 0
    if first and model.position_embedding_type == "learned_absolute":
        whole += (model.max_position_embeddings or 0) * model.hidden_size
    summed += whole if tp > 1 and config.parallel.sequence_parallel else 0
    return LocalParameters(elements + whole, summed, copied, rows if tied and first != last else 0)


def _block(model: TransformerConfig, tp: int, sequence_parallel: bool) -> tuple[int, int, int]:
    """(elements on a tp rank, of these summed over tp, copied over tp) of one block."""
    assert model.kv_channels and model.num_query_groups and model.ffn_hidden_size
    h, d, ffn = model.hidden_size, model.kv_channels, model.ffn_hidden_size // tp
    q, kv = model.num_attention_heads * d // tp, max(model.num_query_groups // tp, 1) * d
    inward = 2 if model.activation == "swiglu" else 1
    keys = 2 * h * kv
    split = 2 * h * q + keys + (inward + 1) * h * ffn
    whole = 2 * _norm(model, h)
    if model.add_bias_linear or model.add_qkv_bias:
        split, keys = split + q + 2 * kv, keys + 2 * kv
    if model.add_bias_linear:
        split, whole = split + inward * ffn, whole + 2 * h
    heads = 2 * _norm(model, d) if model.qk_layernorm else 0  # applied to each rank's own heads
    summed = heads * (tp > 1) + whole * (sequence_parallel and tp > 1)
    return split + whole + heads, summed, keys if model.num_query_groups < tp else 0


def _norm(model: TransformerConfig, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def parameter_bytes(config: RunConfig, elements: int, group: int) -> dict[str, float]:
    """Bytes of weights, gradients, fp32 masters and optimizer states of `elements` elements (padding included, if it
    is to count) on one of `group` ranks of a ZeRO group. Components that need no memory are left out."""
    weight, optimizer = WEIGHT_BYTES[config.training.precision], config.optimizer
    owned = elements / (group if config.parallel.zero_stage >= 1 else 1)
    state = 8 if optimizer.optimizer == "adam" else 4 * (optimizer.sgd_momentum > 0)
    components = {
        "weights": weight * elements,
        "gradients": 4 * elements,
        "master weights": 0 if weight == 4 else 4 * owned,
        "optimizer state": state * owned,
    }
    return {name: float(count) for name, count in components.items() if count}


def reduction_bytes(config: RunConfig, elements: int, group: int) -> float:
    """Largest bytes of copies that travel while gradients are reduced, with all buckets on their way at once.

    NCCL reduces fp32 in place and needs a bf16 copy for bf16 on the wire; gloo receives every other rank's slice.
    """
    if group == 1:
        return 0.0
    wire = 2 if config.parallel.grad_reduce_in_bf16 else 4
    if config.parallel.distributed_backend == "gloo":
        return elements * wire * (group - 1) / group + (elements * wire if wire == 2 else 0)
    return elements * wire * (1 + 1 / group) if wire == 2 else 0.0


def fits(components: Mapping[str, float], device_memory: int) -> bool:
    """Whether all components together are at most the device's memory."""
    return sum(components.values()) <= device_memory
