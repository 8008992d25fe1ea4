"""Scaled dot-product attention: causal, optionally within documents, with grouped key/value heads.

    softmax(q kᵀ / sqrt(d) + mask) v          (Vaswani et al., arXiv 1706.03762; GQA: Ainslie et al., arXiv 2305.13245)

SDPA picks the kernel. Packed documents are a boolean mask, which every SDPA backend but the flash kernels takes
(FlexAttention has no backward on CPU).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megazero.ops.dropout import dropout


def document_mask(document_ids: Tensor) -> Tensor:
    """Who may see whom in packed samples: document ids [b, s] -> bool [b, 1, s, s], True where query sees key."""
    same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)  # [b, s, s]
    return same.tril().unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention. q [b, s, hq, d], k and v [b, s, hkv, d] -> [b, s, hq, d].

    `mask` is `document_mask`'s; it already holds causality.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_rate: float = 0.0,
    dropout_key: int = 0,
    coordinates: list[Tensor] | None = None,
) -> Tensor:
    """The formula with explicit probabilities, softmax in fp32: the reference, and the path for attention dropout.

    `coordinates` name the elements of the probabilities [b, hq, s, s] for `dropout`.
    """
    s, hq, d = q.shape[1:]
    groups = hq // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # [b, s, hq, d]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() / math.sqrt(d)
    if mask is None:
        mask = torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)  # [b, hq, s, s]
    if dropout_rate:
        weights = dropout(weights, dropout_rate, dropout_key, coordinates or [])
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)
