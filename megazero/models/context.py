"""What every block of one forward pass shares: rotary table, document mask, dropout's randomness."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megazero.ops.dropout import Randomness


@dataclass(frozen=True)
class Context:
    """Made once per micro-batch by the model and passed down."""

    rope: tuple[Tensor, Tensor] | None
    """cos and sin, fp32 [b or 1, s, 1, rotary_dim / 2]; None without RoPE."""
    mask: Tensor | None
    """bool [b, 1, s, s] for packed documents; None is plain causal."""
    randomness: Randomness
