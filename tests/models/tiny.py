"""Small resolved models of each family, and a model built with given weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megazero.config.schema import TransformerConfig
from megazero.models.gpt import GPT
from megazero.parallel.topology import Topology
from megazero.zero.buckets import Placed
from megazero.zero.zero import Zero

VOCAB = 50

LLAMA = TransformerConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    max_position_embeddings=64,
    vocab_size=VOCAB,
    make_vocab_size_divisible_by=64,
    init_method_std=0.2,
)
QWEN3 = replace(  # heads wider than hidden / heads, qk-norm, tied
    LLAMA, kv_channels=16, qk_layernorm=True, untie_embeddings_and_output_weights=False, norm_epsilon=1e-6
)
QWEN2 = replace(LLAMA, add_qkv_bias=True)
GPT2 = replace(
    LLAMA,
    num_query_groups=4,
    ffn_hidden_size=128,
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
    activation="gelu_tanh",
    add_bias_linear=True,
    untie_embeddings_and_output_weights=False,
)


def with_weights(config: TransformerConfig, weights: dict[str, Tensor]) -> tuple[GPT, Zero]:
    """The model on one process with these weights by logical name; embedding rows are padded with noise, which must
    never be seen. Raises KeyError when a name is missing."""

    def value(place: Placed) -> Tensor:
        weight, shape = weights[place.spec.name].detach().float(), place.spec.shape
        if weight.shape != shape:
            assert weight.shape[1:] == shape[1:] and weight.shape[0] == VOCAB < shape[0], place.spec
            weight = torch.cat([weight, torch.full((shape[0] - VOCAB, shape[1]), 3.0)])
        return weight

    model = GPT(config, Topology.single())
    zero = Zero(
        model, Topology.single(), stage=0, dtype=torch.float32, device=torch.device("cpu"), initial=value, units=[]
    )
    return model, zero


def gradients(zero: Zero) -> dict[str, Tensor]:
    """By logical name, after backward."""
    zero.finish_reduction()
    return {
        place.spec.name: bucket.grads[place.start : place.stop].view(place.spec.shape)
        for bucket in zero.buckets
        for place in bucket.placed
    }
