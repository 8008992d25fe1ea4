"""Compare an op with its torch reference, values and gradients, in the type it runs in.

In bf16 both are compared with the reference in fp32 on the same (rounded) inputs: an op may be as far from it as a few
roundings to 8 bits, no matter what its reference does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
DTYPES = [torch.float32, torch.bfloat16]

Op = Callable[..., Tensor]


def run(op: Op, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """op(*inputs) and its gradients by each input, given the gradient of its result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_equals_reference(op: Op, reference: Op, *inputs: Tensor, tolerance: float | None = None) -> None:
    """Relative to the largest element; results must have the inputs' own types, and be finite and not all zero."""
    generator = torch.Generator().manual_seed(99)
    grad = torch.randn(op(*inputs).shape, generator=generator).to(inputs[0].dtype)
    ours = run(op, list(inputs), grad)
    wide = run(reference, [x.float() for x in inputs], grad.float())
    assert ours[0].dtype == inputs[0].dtype
    for index, (got, expected) in enumerate(zip(ours, wide, strict=True)):
        if index:
            assert got.dtype == inputs[index - 1].dtype
        assert got.shape == expected.shape
        size = expected.abs().max()
        assert size > 0
        error = (got.float() - expected).abs().max() / size
        assert error <= (tolerance or ROUNDING[inputs[0].dtype]), f"result {index} is off by {error:.2g} of {size:.2g}"
