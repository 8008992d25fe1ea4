"""The feed-forward layer, its width split over tp.

swiglu:  down(silu(gate(x)) · up(x))        others:  down(act(up(x)))         x [b, s, h], inside [b, s, ffn/tp]
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from megazero.config.schema import TransformerConfig
from megazero.ops.activation import UNGATED, swiglu
from megazero.parallel.tensor import ColumnParallelLinear, RowParallelLinear, enter_tensor_parallel
from megazero.parallel.topology import Topology


class MLP(nn.Module):
    """[b, s, h] -> [b, s, h]."""

    def __init__(self, name: str, config: TransformerConfig, topology: Topology) -> None:
        super().__init__()
        assert config.ffn_hidden_size
        self.topology = topology
        h, ffn, bias, std = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear, config.init_method_std
        inward = {"bias": bias, "init_std": std, "enter": False}
        self.gate_proj: nn.Module | None = None
        if config.activation == "swiglu":
            self.gate_proj = ColumnParallelLinear(f"{name}.gate_proj", h, ffn, topology, **inward)
        else:
            self.activation = UNGATED[config.activation]
        self.up_proj = ColumnParallelLinear(f"{name}.up_proj", h, ffn, topology, **inward)
        out_std = std / math.sqrt(2 * config.num_layers)
        self.down_proj = RowParallelLinear(f"{name}.down_proj", ffn, h, topology, bias=bias, init_std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.entered(enter_tensor_parallel(x, self.topology))

    def entered(self, x: Tensor) -> Tensor:
        """The same, of an x that has passed `enter_tensor_parallel`."""
        if self.gate_proj is not None:
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(self.activation(self.up_proj(x)))
