"""torch's own optimizers, in torch's fused kernels wherever it has one for the parameters' device.

Names mean what torch means, with torch's defaults: Adam adds weight decay to the gradient (L2), AdamW decays the weight
itself. FusedAdam and CPUAdam take DeepSpeed's arguments but differ from its classes in one default: their weight_decay
is torch's (0.01 for AdamW's kind), where DeepSpeed's is 0, so FusedAdam(p, lr) trains as torch.optim.AdamW(p, lr) does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def listed(params: Any) -> list[dict[str, Any]]:
    """Parameters as torch takes them (tensors, (name, tensor) pairs, or groups) as groups that hold lists.

    Groups stay the dicts that were given, as in torch.optim: who made an optimizer of another one's `param_groups`
    sets the learning rate of both.
    """
    if isinstance(params, Tensor):
        raise TypeError("an optimizer takes an iterable of parameters, got one tensor. Put it into a list.")
    groups = list(params)
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}] if groups else []
    for group in groups:
        entries = group["params"]
        group["params"] = [entries] if isinstance(entries, Tensor) else list(entries)
    return groups


def tensors_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    """All parameters of such groups."""
    return [entry[1] if isinstance(entry, tuple) else entry for group in groups for entry in group["params"]]


def can_fuse(tensors: Iterable[Tensor], devices: tuple[str, ...] = _FUSED_DEVICES) -> bool:
    """Whether torch's fused kernels take these: on such a device, and floating point."""
    return all(isinstance(t, Tensor) and t.device.type in devices and t.is_floating_point() for t in tensors)


class _Fused(torch.optim.Optimizer):
    """Sets torch's `fused` where it can be, unless the user has a say in the kernel."""

    fused_devices: tuple[str, ...] = _FUSED_DEVICES

    def __init__(self, params: Any, *arguments: Any, **options: Any) -> None:
        groups = listed(params)
        chosen = any(options.get(name) is not None for name in ("fused", "foreach"))
        if not chosen and not options.get("differentiable") and not options.get("capturable"):
            options["fused"] = can_fuse(tensors_of(groups), self.fused_devices) or None
        super().__init__(groups, *arguments, **options)


class Adam(_Fused, torch.optim.Adam):
    """torch.optim.Adam: weight decay is added to the gradient (L2)."""


class AdamW(_Fused, torch.optim.AdamW):
    """torch.optim.AdamW: weight decay is decoupled."""


class SGD(_Fused, torch.optim.SGD):
    """torch.optim.SGD. Its fused kernel cannot begin the momentum of some parameters while others have theirs (torch
    2.13 raises a TypeError): a parameter whose first gradient comes later is given a buffer to go on from."""

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffer_list: list[Tensor | None],
    ) -> Any:
        has_sparse_grad = super()._init_group(group, params, grads, momentum_buffer_list)
        new = [at for at, buffer in enumerate(momentum_buffer_list) if buffer is None]
        if group.get("fused") and group["momentum"] and len(new) < len(momentum_buffer_list):
            for at in new:  # the first buffer is the gradient g itself: momentum * b + (1 - dampening) * g = g
                gradient = -grads[at] if group["maximize"] else grads[at]
                gradient = gradient.add(params[at], alpha=group["weight_decay"])
                momentum_buffer_list[at] = gradient.mul_(group["dampening"] / group["momentum"])
        return has_sparse_grad


class Adagrad(_Fused, torch.optim.Adagrad):
    """torch.optim.Adagrad."""

    fused_devices = ("cpu",)


class FusedAdam(_Fused, torch.optim.Adam):
    """torch.optim.AdamW (or Adam, with adam_w_mode False) under the arguments of DeepSpeed's FusedAdam.

    With the same lr it gives the weights of torch.optim.AdamW. DeepSpeed's own class decays no weights unless told to;
    pass weight_decay=0.0 for that.

    Args:
        weight_decay: None is torch's default: 0.01, or 0 with adam_w_mode False.
        set_grad_none: what zero_grad() does by default.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        check_bias_correction(type(self).__name__, bias_correction)
        decay = (0.01 if adam_w_mode else 0.0) if weight_decay is None else weight_decay
        self.set_grad_none = set_grad_none
        super().__init__(
            params,
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=decay,
            amsgrad=amsgrad,
            decoupled_weight_decay=bool(adam_w_mode),
        )

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients, or fill them with zeros."""
        super().zero_grad(getattr(self, "set_grad_none", True) if set_to_none is None else set_to_none)


class CPUAdam(FusedAdam):
    """FusedAdam under the arguments of DeepSpeed's DeepSpeedCPUAdam; runs wherever its parameters are.

    Its states have the parameters' type; under ZeRO these are fp32 masters.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if not fp32_optimizer_states:
            raise ValueError(
                "CPUAdam with fp32_optimizer_states False: its states have the type of the parameters, which is fp32 "
                "for masters. Leave it out; to hold less, take an 8-bit Adam (type Adam8bit)."
            )
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


def check_bias_correction(name: str, value: bool) -> None:
    """Raise ValueError when Adam's bias correction is to be off."""
    if not value:
        raise ValueError(
            f"{name} with bias_correction False: torch's Adam always corrects the bias of its moments. Leave it out; "
            "where the first steps are to be smaller, warm the learning rate up."
        )
