"""In which types a forward runs: weights, autocast, inputs; and where the loss scale enters a plain `loss.backward()`.

inputs ─(cast?)─► module, weights in `dtype`, under autocast? ─► outputs ─► loss ─► loss.backward()
                                             gradient · scale ◄─┘ here
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from megazero.config.schema import TrainingConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Weights' type by `training.precision`."""
_MISMATCH = ("same dtype", "expected scalar type", "should be the same", "expected m1 and m2", "must match")

_IN_16_BITS = (
    ', or let the engine do it with "{}": {{"auto_cast": true}} (training.autocast_inputs), or keep fp32 weights and '
    'compute in 16 bits with "torch_autocast": {{"enabled": true}} (training.autocast).'
)


class Precision:
    """The types of one engine's forward."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.dtype, self.device = DTYPES[config.precision], device
        self.autocast = None if config.autocast == "none" else DTYPES[config.autocast]
        self.cast_inputs = config.autocast_inputs
        self.scales_loss = torch.float16 in (self.dtype, self.autocast)
        """Whether gradients pass through fp16, where small ones vanish unless the loss is scaled up."""

    def inputs(self, values: Any) -> Any:
        """The module's arguments, floating tensors in the weights' type if that was asked for."""
        if not self.cast_inputs:
            return values
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, values)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward: autocast, and a remedy beside torch's error about types that do not fit."""
        context: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.device.type, self.autocast)
        try:
            with context:
                yield
        except RuntimeError as error:
            said = f"{error} {error.__cause__}"
            mixed = self.dtype != torch.float32 or "ouble" in said
            if mixed and "type" in said and any(part in said for part in _MISMATCH):
                name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
                error.add_note(
                    f"The weights are {self.dtype}. If an input is not: cast it with .to({self.dtype})"
                    + ("." if self.dtype == torch.float32 else _IN_16_BITS.format(name))
                )
            raise


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by what `factor` returns then."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Callable[[], float]) -> Tensor:
        ctx.factor = factor
        return tensor.clone() if tensor.dim() == 0 else tensor.view_as(tensor)  # losses are changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        factor = ctx.factor()
        return gradients[0] if factor == 1.0 else gradients[0] * factor, None


def scaled_outputs(outputs: Any, factor: Callable[[], float]) -> Any:
    """The same outputs, with gradients multiplied by `factor()` on their way back into the module.

    Reaches tensors in tuples, lists, mappings, dataclasses and Hugging Face outputs. Each comes out of the identity, so
    that a loss which was computed from other outputs inside the module is scaled once.
    """

    def scaled(value: Any) -> Any:
        if isinstance(value, Tensor):
            wanted = value.requires_grad and value.is_floating_point()
            return _Scaled.apply(value, factor) if wanted else value
        return value

    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type | Mapping):
        fields = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs) if field.init}
        return dataclasses.replace(outputs, **{k: pytree.tree_map(scaled, v) for k, v in fields.items()})
    return pytree.tree_map(scaled, outputs)
