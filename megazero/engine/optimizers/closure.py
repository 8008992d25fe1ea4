"""The closure that torch lets a caller give to `optimizer.step`: it computes the loss and its gradients again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure returns, called with gradients on, as steps run without; None for none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
