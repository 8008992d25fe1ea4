"""Self-attention with query heads split over tp and grouped key/value heads (GQA).

    x ─ enter ─┬─ q_proj ─ [q_norm] ─ rope ─┐
               ├─ k_proj ─ [k_norm] ─ rope ─┼─ softmax(q kᵀ/√d) v ─ o_proj ─ y        x, y [b, s, h]
               └─ v_proj ───────────────────┘        heads/tp on each rank

With fewer key/value heads than tp ranks, tp / groups neighbouring ranks hold the same head and their gradients are
summed. Where a sequence is split over cp, the softmax is a ring's or has an exchange of tokens for heads around it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megazero.config.schema import TransformerConfig
from megazero.models.context import Context
from megazero.models.norm import Norm
from megazero.ops.attention import attention, attention_reference
from megazero.ops.rope import apply_rope
from megazero.parallel.recompute import KEEP_ALL, Recompute
from megazero.parallel.ring import ring_attention
from megazero.parallel.tensor import ColumnParallelLinear, RowParallelLinear, enter_tensor_parallel
from megazero.parallel.topology import Topology
from megazero.parallel.ulysses import heads_to_tokens, tokens_to_heads


class Attention(nn.Module):
    """Causal self-attention: [b, s, h] -> [b, s, h]."""

    def __init__(
        self, name: str, config: TransformerConfig, topology: Topology, recompute: Recompute = KEEP_ALL
    ) -> None:
        super().__init__()
        assert config.num_query_groups and config.kv_channels
        self.name, self.topology, self.recompute, tp = name, topology, recompute, topology.group("tp")
        self.head_dim = config.kv_channels
        self.dropout = config.attention_dropout
        self.heads = config.num_attention_heads // tp.size
        std, h = config.init_method_std, config.hidden_size
        copies = max(tp.size // config.num_query_groups, 1)
        bias = config.add_bias_linear or config.add_qkv_bias
        query, kv = config.num_attention_heads * self.head_dim, config.num_query_groups * self.head_dim
        inward = {"bias": bias, "init_std": std, "enter": False}
        self.q_proj = ColumnParallelLinear(f"{name}.q_proj", h, query, topology, **inward)
        self.k_proj = ColumnParallelLinear(f"{name}.k_proj", h, kv, topology, copies=copies, **inward)
        self.v_proj = ColumnParallelLinear(f"{name}.v_proj", h, kv, topology, copies=copies, **inward)
        out_std = std / math.sqrt(2 * config.num_layers)
        self.o_proj = RowParallelLinear(
            f"{name}.o_proj", query, h, topology, bias=config.add_bias_linear, init_std=out_std
        )
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if config.qk_layernorm:  # over one head's channels, shared by the heads, which differ between tp ranks
            self.q_norm = Norm(f"{name}.q_norm", self.head_dim, config, topology, partial=True)
            self.k_norm = Norm(f"{name}.k_norm", self.head_dim, config, topology, partial=True)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.entered(enter_tensor_parallel(x, self.topology), context)

    def entered(self, x: Tensor, context: Context) -> Tensor:
        """The same, of an x that has passed `enter_tensor_parallel`."""
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, -1, self.head_dim)  # [b, s, heads/tp, d]
        k = self.k_proj(x).view(b, s, -1, self.head_dim)  # [b, s, groups/tp or 1, d]
        v = self.v_proj(x).view(b, s, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        out = self.recompute.part("core_attn", self._core, q, k, v, context)
        return self.o_proj(out.reshape(b, s, -1))

    def _core(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """The softmax and what it weighs: [b, s, heads/tp, d], wherever the other tokens of the sequence are."""
        first = self.topology.group("tp").rank * self.heads  # logical number of the first query head here
        if context.cp is None:
            return self._whole(q, k, v, context, first)
        if self.topology.cp_comm == "p2p":
            return ring_attention(q, k, v, context.mask, context.cp)
        q, k, v = tokens_to_heads(q, k, v, context.cp)
        out = self._whole(q, k, v, context, first + context.cp.rank * q.shape[2])
        return heads_to_tokens(out, context.cp)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, context: Context, first: int) -> Tensor:
        """Attention with the whole sequence here, of the heads from number `first` on."""
        if not (self.dropout and self.training):
            return attention(q, k, v, context.mask)
        heads, places = (torch.arange(n, device=q.device) for n in (q.shape[2], q.shape[1]))
        coordinates = [
            context.randomness.sample.view(-1, 1, 1, 1),
            (first + heads).view(1, -1, 1, 1),
            places.view(1, 1, -1, 1),
            places.view(1, 1, 1, -1),
        ]
        key = context.randomness.key(f"{self.name}.probabilities")
        return attention_reference(q, k, v, context.mask, self.dropout, key, coordinates)
