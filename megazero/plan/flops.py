"""Parameters of a model and floating-point operations of a token, from its TransformerConfig alone.

    forward FLOPs per token = L · (2h(q + 2k) + 2qh + 2sq + 2hf·m) + 2hV        q = heads · d   k = kv heads · d
    training                = 3 · forward (backward costs twice the forward)    m = 3 with a gate, else 2

One multiply-add is 2 FLOPs. The attention core (scores and their product with the values, 4sq over the whole square)
is halved for causality. Recomputation is not counted: these are the model's FLOPs, not the hardware's. Norms,
activations and softmax are left out. Source: Megatron-LM's present `num_floating_point_operations`
(megatron/training/training.py); Narayanan et al. 2021 (https://arxiv.org/abs/2104.04473, appendix) count the whole
square.
"""

from __future__ import annotations

from megazero.config.layout import padded_vocab_size
from megazero.config.schema import TransformerConfig


def parameter_count(model: TransformerConfig, padded: bool = False) -> int:
    """Number of trainable elements; tied weights count once, embedding rows without padding unless `padded`.

    `model` is resolved: its derived values are filled in.
    """
    h = model.hidden_size
    total = model.num_layers * _block_parameters(model) + _norm_parameters(model, h)
    total += _vocab_rows(model, padded) * h * (2 if model.untie_embeddings_and_output_weights else 1)
    if model.position_embedding_type == "learned_absolute":
        total += _given(model.max_position_embeddings) * h
    return total


def flops_per_token(model: TransformerConfig, seq_length: int) -> float:
    """FLOPs of forward and backward for one token of a causal sequence of `seq_length`, by the formula above.

    V is the padded vocabulary, as in Megatron. `model` is resolved.
    """
    h, q, k = model.hidden_size, _query_width(model), _key_value_width(model)
    attention = 2 * h * (q + 2 * k) + 2 * q * h + 2 * seq_length * q
    mlp = 2 * h * _given(model.ffn_hidden_size) * _mlp_matrices(model)
    forward = model.num_layers * (attention + mlp) + 2 * h * _vocab_rows(model, padded=True)
    return 3.0 * forward


def _block_parameters(model: TransformerConfig) -> int:
    """q, k, v and output projections, MLP, two norms, and one norm each for queries and keys with qk-layernorm."""
    h, q, k = model.hidden_size, _query_width(model), _key_value_width(model)
    ffn, matrices = _given(model.ffn_hidden_size), _mlp_matrices(model)
    weights = h * (q + 2 * k) + q * h + matrices * h * ffn
    norms = 2 * _norm_parameters(model, h)
    if model.qk_layernorm:
        norms += 2 * _norm_parameters(model, _given(model.kv_channels))
    biases = 0
    if model.add_bias_linear or model.add_qkv_bias:
        biases += q + 2 * k
    if model.add_bias_linear:
        biases += h + (matrices - 1) * ffn + h  # attention output; up and gate; down
    return weights + norms + biases


def _norm_parameters(model: TransformerConfig, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def _query_width(model: TransformerConfig) -> int:
    return model.num_attention_heads * _given(model.kv_channels)


def _key_value_width(model: TransformerConfig) -> int:
    return _given(model.num_query_groups) * _given(model.kv_channels)


def _mlp_matrices(model: TransformerConfig) -> int:
    return 3 if model.activation == "swiglu" else 2


def _vocab_rows(model: TransformerConfig, padded: bool) -> int:
    rows = _given(model.vocab_size)
    return padded_vocab_size(rows, model.make_vocab_size_divisible_by) if padded else rows


def _given(value: int | None) -> int:
    assert value is not None, "the model's derived sizes are not filled in: resolve the configuration first"
    return value
