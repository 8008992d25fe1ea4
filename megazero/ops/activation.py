"""The MLP's non-linearities.

swiglu(gate, up) = silu(gate) · up   (Shazeer, arXiv 2002.05202)      squared_relu(x) = max(x, 0)²   (So et al.,
2109.08668) gelu(x) = x · Φ(x)                   (Hendrycks & Gimpel, 1606.08415) gelu_tanh: GPT-2's tanh
approximation of it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula; gate and up [..., n] -> [..., n]."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; gate and up [..., n] -> [..., n]. Keeps gate and up alone for backward."""
    if torch.compiler.is_compiling():
        return swiglu_reference(gate, up)
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    # Plain autograd would keep silu(gate) as well: a third of this op's memory.
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)², elementwise."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's gelu, elementwise."""
    return F.gelu(x, approximate="tanh")


UNGATED: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "squared_relu": squared_relu}
