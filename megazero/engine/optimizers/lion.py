"""Lion: one momentum per element, and updates of equal size everywhere (megazero/ops/lion.py has the formula)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megazero.engine.optimizers.closure import loss_of
from megazero.ops.lion import lion_update


class Lion(torch.optim.Optimizer):
    """Lion with the paper's defaults. Its lr is usually 3 to 10 times lower than AdamW's, weight_decay as much higher.

    DeepSpeed's FusedLion has betas (0.9, 0.999) and lr 1e-3 by default; state them to get those.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        if lr < 0:
            raise ValueError(f"Lion with lr {lr}: a learning rate is 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion with betas {betas}: each must be at least 0 and below 1")
        if weight_decay < 0:
            raise ValueError(f"Lion with weight_decay {weight_decay}: it is 0 or more")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters with a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                lion_update(
                    parameter,
                    parameter.grad,
                    state["exp_avg"],
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    weight_decay=group["weight_decay"],
                )
        return loss
