"""One transformer block: pre-norm attention and MLP, each added to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megazero.config.schema import TransformerConfig
from megazero.models.attention import Attention
from megazero.models.context import Context
from megazero.models.mlp import MLP
from megazero.models.norm import Norm
from megazero.ops.dropout import Randomness, dropout
from megazero.parallel.topology import Topology


class Block(nn.Module):
    """[b, s, h] -> [b, s, h]."""

    def __init__(self, name: str, config: TransformerConfig, topology: Topology) -> None:
        super().__init__()
        self.name, self.dropout = name, config.hidden_dropout
        self.input_layernorm = Norm(f"{name}.input_layernorm", config.hidden_size, config, topology)
        self.self_attn = Attention(f"{name}.self_attn", config, topology)
        self.post_attention_layernorm = Norm(f"{name}.post_attention_layernorm", config.hidden_size, config, topology)
        self.mlp = MLP(f"{name}.mlp", config, topology)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self._drop(self.self_attn(self.input_layernorm(x), context), "self_attn", context)
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)), "mlp", context)

    def _drop(self, x: Tensor, site: str, context: Context) -> Tensor:
        if not self.training:
            return x
        return hidden_dropout(x, self.dropout, f"{self.name}.{site}", context.randomness)


def hidden_dropout(x: Tensor, rate: float, site: str, randomness: Randomness) -> Tensor:
    """Dropout on the residual stream x [b, s, h], by sample, position and channel."""
    if rate == 0.0:
        return x
    _, s, h = x.shape
    positions, channels = torch.arange(s, device=x.device), torch.arange(h, device=x.device)
    coordinates = [randomness.sample.view(-1, 1, 1), positions.view(1, -1, 1), channels.view(1, 1, -1)]
    return dropout(x, rate, randomness.key(site), coordinates)
