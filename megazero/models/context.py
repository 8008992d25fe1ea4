"""What every block of one forward pass shares: rotary table, document mask, randomness, and which tokens are here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megazero.ops.dropout import Randomness
from megazero.parallel.topology import AxisGroup


@dataclass(frozen=True)
class Context:
    """Made once per micro-batch by the model and passed down."""

    rope: tuple[Tensor, Tensor] | None
    """cos and sin, fp32 [b or 1, s, 1, rotary_dim / 2]; None without RoPE."""
    mask: Tensor | None
    """bool [b, 1, s, s] for packed documents; None is plain causal. With ring attention, the rows are those of the
    tokens here and the columns in ring order: [b, 1, s/cp, s]."""
    randomness: Randomness
    places: Tensor
    """int64 [s]: where in its logical sequence each token here stands."""
    stream_places: Tensor
    """The same for the residual stream, of which sequence parallelism leaves each tp rank a part: int64 [s or s/tp]."""
    cp: AxisGroup | None = None
    """The ranks that hold the other parts of these sequences; None: they are here whole. With it, s above is s/cp."""
