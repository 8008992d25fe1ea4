"""Attention of some queries over some keys with the log-sum-exp of the scores, so that parts can be merged.

    out = softmax(q kᵀ/√d) v,  lse = log Σ exp(q kᵀ/√d)          two parts a, b of the keys:  lse = log(eᵃ + eᵇ),
    out = outₐ · e^(lseₐ - lse) + out_b · e^(lse_b - lse)        (Milakov and Gimelshein, arXiv 1805.02867)

The backward of a part takes the merged out and lse: it needs no others. torch's flash kernels do both; the explicit
formula stands in where none takes the arguments (a mask or fp32 on CUDA).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [b, sq, hq, d], k and v [b, sk, hkv, d] -> out [b, sq, hq, d] and lse, fp32 [b, hq, sq].

    `causal` is for sq = sk; `mask` bool [b, 1, sq, sk] is True where the query sees the key. They exclude each other. A
    query that sees no key has out 0 and lse -inf.
    """
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    if q.device.type != "cuda":
        added = None if mask is None else _as_bias(mask, q.dtype)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, causal, attn_mask=added)
        if mask is not None:
            lse = lse.masked_fill(~mask.any(-1), -math.inf)  # the kernel says 0
    elif _flash(q, mask):
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(*heads, 0.0, causal)
    else:
        return attend_reference(q, k, v, causal=causal, mask=mask)
    return out.transpose(1, 2), lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What this part of the keys adds to the gradients of q, k and v; `out` and `lse` (finite) are the merged ones."""
    heads = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    if q.device.type != "cuda":
        added = None if mask is None else _as_bias(mask, q.dtype)
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(*heads, lse, 0.0, causal, attn_mask=added)
    elif _flash(q, mask):
        unused = torch.empty(0, dtype=torch.int64, device=q.device)  # state of the kernel's dropout
        lengths = (None, None, q.shape[1], k.shape[1])
        backward = _aten._scaled_dot_product_flash_attention_backward
        grads = backward(*heads, lse.contiguous(), *lengths, 0.0, causal, unused, unused)
    else:
        return attend_backward_reference(grad, q, k, v, out, lse, causal=causal, mask=mask)
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula of `attend`, softmax in fp32."""
    scores, seen = _scores(q, k, causal, mask)  # [b, hkv, hq/hkv, sq, sk]
    lse = scores.logsumexp(-1)
    weights = _weights(scores, lse, seen)
    out = torch.einsum("bhgqk,bkhd->bqhgd", weights.to(v.dtype), v)
    return out.flatten(2, 3), lse.flatten(1, 2)


def attend_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of `attend_backward`:  dv = pᵀ g,  ds = p · (g vᵀ - Σ g·out),  dq = ds k/√d,  dk = dsᵀ q/√d."""
    grouped = (k.shape[2], q.shape[2] // k.shape[2])
    scores, seen = _scores(q, k, causal, mask)
    weights = _weights(scores, lse.unflatten(1, grouped), seen)  # [b, hkv, hq/hkv, sq, sk]
    g = grad.unflatten(2, grouped)  # [b, sq, hkv, hq/hkv, d]
    delta = (grad.float() * out.float()).sum(-1).unflatten(2, grouped).permute(0, 2, 3, 1).unsqueeze(-1)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", weights.to(g.dtype), g)
    ds = weights * (torch.einsum("bqhgd,bkhd->bhgqk", g, v).float() - delta) / math.sqrt(q.shape[-1])
    ds = ds.to(q.dtype)
    dq = torch.einsum("bhgqk,bkhd->bqhgd", ds, k).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", ds, q.unflatten(2, grouped))
    return dq, dk, dv


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a part's result into out (fp32 [b, s, h, d]) and lse (fp32 [b, h, s], finite), in place."""
    share = torch.sigmoid(part_lse - lse)  # e^part_lse / (e^part_lse + e^lse)
    out.lerp_(part.float(), share.transpose(1, 2).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _flash(q: Tensor, mask: Tensor | None) -> bool:
    """Whether CUDA's flash kernel takes this."""
    return mask is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def _scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scaled scores, fp32 [b, hkv, hq/hkv, sq, sk], -inf where unseen, and who sees whom (None: everyone)."""
    q = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k).float() / math.sqrt(q.shape[-1])
    seen = None if mask is None else mask.unsqueeze(2)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (scores if seen is None else scores.masked_fill(~seen, -math.inf)), seen


def _weights(scores: Tensor, lse: Tensor, seen: Tensor | None) -> Tensor:
    weights = (scores - lse.unsqueeze(-1)).exp()
    return weights if seen is None else weights.masked_fill(~seen, 0.0)  # not NaN in a row that sees nothing
