"""One transformer block: pre-norm attention and MLP, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megazero.config.schema import TransformerConfig
from megazero.models.attention import Attention
from megazero.models.context import Context
from megazero.models.mlp import MLP
from megazero.models.norm import Norm
from megazero.ops.dropout import dropout
from megazero.parallel.recompute import KEEP_ALL, Recompute, without_keeping
from megazero.parallel.tensor import enter_tensor_parallel
from megazero.parallel.topology import Topology


class Block(nn.Module):
    """[b, s, h] -> [b, s, h]."""

    def __init__(
        self, name: str, config: TransformerConfig, topology: Topology, recompute: Recompute = KEEP_ALL
    ) -> None:
        super().__init__()
        self.name, self.topology, self.recompute = name, topology, recompute
        self.dropout = config.hidden_dropout
        self.input_layernorm = Norm(f"{name}.input_layernorm", config.hidden_size, config, topology)
        self.self_attn = Attention(f"{name}.self_attn", config, topology, recompute)
        self.post_attention_layernorm = Norm(f"{name}.post_attention_layernorm", config.hidden_size, config, topology)
        self.mlp = MLP(f"{name}.mlp", config, topology)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self._drop(self._attend(x, context), "self_attn", context)
        return x + self._drop(self._transform(x), "mlp", context)

    def _attend(self, x: Tensor, context: Context) -> Tensor:
        if not self.recompute.takes("layernorm"):
            return self.self_attn(self.input_layernorm(x), context)
        return without_keeping(self._into(self.input_layernorm), self.self_attn.entered, x, context)

    def _transform(self, x: Tensor) -> Tensor:
        norm, recompute = self.post_attention_layernorm, self.recompute
        if not recompute.takes("layernorm"):
            return recompute.part("mlp", self.mlp, norm(x))
        if recompute.takes("mlp"):
            return recompute.part("mlp", lambda x: self.mlp(norm(x)), x)
        return without_keeping(self._into(norm), self.mlp.entered, x)

    def _into(self, norm: Norm) -> Callable[[Tensor], Tensor]:
        """The norm and the gather after it, if any: what the projections read."""
        return lambda x: enter_tensor_parallel(norm(x), self.topology)

    def _drop(self, x: Tensor, site: str, context: Context) -> Tensor:
        if not self.training or self.dropout == 0.0:  # without it, a compiled block is not one for all names
            return x
        return hidden_dropout(x, self.dropout, f"{self.name}.{site}", context)


def hidden_dropout(x: Tensor, rate: float, site: str, context: Context) -> Tensor:
    """Dropout on the residual stream x [b, s, h], by sample, position and channel."""
    if rate == 0.0:
        return x
    sample, channels = context.randomness.sample, torch.arange(x.shape[-1], device=x.device)
    coordinates = [sample.view(-1, 1, 1), context.stream_places.view(1, -1, 1), channels.view(1, 1, -1)]
    return dropout(x, rate, context.randomness.key(site), coordinates)
