"""Self-attention with query heads split over tp and grouped key/value heads (GQA).

    x ─ enter ─┬─ q_proj ─ [q_norm] ─ rope ─┐
               ├─ k_proj ─ [k_norm] ─ rope ─┼─ softmax(q kᵀ/√d) v ─ o_proj ─ y        x, y [b, s, h]
               └─ v_proj ───────────────────┘        heads/tp on each rank

With fewer key/value heads than tp ranks, tp / groups neighbouring ranks hold the same head and their gradients are
summed.
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
from megazero.parallel.tensor import ColumnParallelLinear, RowParallelLinear, enter_tensor_parallel
from megazero.parallel.topology import Topology


class Attention(nn.Module):
    """Causal self-attention: [b, s, h] -> [b, s, h]."""

    def __init__(self, name: str, config: TransformerConfig, topology: Topology) -> None:
        super().__init__()
        assert config.num_query_groups and config.kv_channels
        self.name, self.group = name, topology.group("tp")
        self.head_dim = config.kv_channels
        self.dropout = config.attention_dropout
        self.heads = config.num_attention_heads // self.group.size
        std, h = config.init_method_std, config.hidden_size
        copies = max(self.group.size // config.num_query_groups, 1)
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
        b, s, _ = x.shape
        x = enter_tensor_parallel(x, self.group)
        q = self.q_proj(x).view(b, s, -1, self.head_dim)  # [b, s, heads/tp, d]
        k = self.k_proj(x).view(b, s, -1, self.head_dim)  # [b, s, groups/tp or 1, d]
        v = self.v_proj(x).view(b, s, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        if self.dropout and self.training:
            out = self._with_dropout(q, k, v, context)
        else:
            out = attention(q, k, v, context.mask)
        return self.o_proj(out.reshape(b, s, -1))

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        positions = torch.arange(q.shape[1], device=q.device)
        heads = torch.arange(self.heads, device=q.device) + self.group.rank * self.heads  # logical numbers
        coordinates = [
            context.randomness.sample.view(-1, 1, 1, 1),
            heads.view(1, -1, 1, 1),
            positions.view(1, 1, -1, 1),
            positions.view(1, 1, 1, -1),
        ]
        key = context.randomness.key(f"{self.name}.probabilities")
        return attention_reference(q, k, v, context.mask, self.dropout, key, coordinates)
