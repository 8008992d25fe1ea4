"""The norm layer that a TransformerConfig asks for; replicated over tp."""

from __future__ import annotations

from torch import Tensor, nn

from megazero.config.schema import TransformerConfig
from megazero.ops.norm import layer_norm, rms_norm
from megazero.parallel.tensor import replicated
from megazero.parallel.topology import Topology


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last `width` channels: [..., width] -> [..., width].

    `partial`: each tp rank feeds it other data (its own heads, say), so that its gradients are summed over tp.
    """

    def __init__(
        self, name: str, width: int, config: TransformerConfig, topology: Topology, *, partial: bool = False
    ) -> None:
        super().__init__()
        self.eps = config.norm_epsilon
        self.weight = replicated(f"{name}.weight", (width,), topology, partial=partial, init_fill=1.0)
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = replicated(f"{name}.bias", (width,), topology, partial=partial)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)
