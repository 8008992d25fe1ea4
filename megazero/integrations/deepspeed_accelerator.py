"""`deepspeed.accelerator`: the device of this process, asked by methods. What is not here is asked of torch.cuda, or of
torch.cpu where there is no GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megazero.base.device import default_backend, device_type


class Accelerator:
    """This process's kind of device."""

    def __init__(self) -> None:
        self._name = device_type()
        self._module: Any = torch.cuda if self._name == "cuda" else torch.cpu

    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda", "cuda:1", or "cpu", which has no numbers."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(self.device_name(device_index))

    def current_device_name(self) -> str:
        return self.device_name(None if self._name == "cpu" else torch.cuda.current_device())

    def communication_backend_name(self) -> str:
        return default_backend(self._name)

    def is_available(self) -> bool:
        return True

    def is_synchronized_device(self) -> bool:
        """Whether an operation is done when its call returns."""
        return self._name == "cpu"

    def is_bf16_supported(self) -> bool:
        return self._name == "cpu" or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        return True

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """Page-locked where there is a device to copy to."""
        return tensor.pin_memory() if self._name == "cuda" else tensor

    def empty_cache(self) -> None:
        if self._name == "cuda":
            torch.cuda.empty_cache()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self._module, name):
            raise AttributeError(f"get_accelerator().{name}: {self._module.__name__} has no {name}. Ask torch itself.")
        return getattr(self._module, name)


@functools.cache
def get_accelerator() -> Accelerator:
    return Accelerator()
