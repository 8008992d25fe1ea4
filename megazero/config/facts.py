"""What a configuration needs to know of a module to settle sizes: three numbers, found by whoever has the module."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """The size of a model."""

    parameters: int
    """Elements of all parameters, shared ones once."""
    hidden_size: int | None
    """Width of the residual stream, where the model says it (a Hugging Face config's hidden_size)."""
    largest_layer: int
    """Elements of the parameters of the largest unit that is gathered as one."""

    @property
    def width(self) -> tuple[int, str]:
        """The hidden size and how it is known: a block of a transformer has about 12 · width² elements."""
        if self.hidden_size is not None:
            return self.hidden_size, "hidden size"
        return max(math.isqrt(max(self.largest_layer, 1) // 12), 1), "√(largest layer / 12)"
