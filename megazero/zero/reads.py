"""A module's parameters that tell when they are read.

module.weight ─► module._parameters["weight"] ─► before(weight): it is gathered, or waited for ─► weight
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class OnAccess(dict[str, nn.Parameter | None]):
    """A module's `_parameters`, which tells of each that is read through an attribute, and of each that is listed
    (`parameters()`, `state_dict()`)."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter | None],
        before: Callable[[nn.Parameter], None],
        listed: Callable[[nn.Parameter], None],
        before_copy: Callable[[Iterable[nn.Parameter]], None],
    ) -> None:
        super().__init__(parameters)
        self._before, self._listed, self._before_copy = before, listed, before_copy

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._before(parameter)
        return parameter

    def items(self) -> Any:
        for parameter in super().values():
            if parameter is not None:
                self._listed(parameter)
        return super().items()

    def __reduce__(self) -> Any:  # a copied or pickled module is an ordinary one
        plain = self.plain()
        self._before_copy(p for p in plain.values() if p is not None)
        return dict, (plain,)

    def plain(self) -> dict[str, nn.Parameter | None]:
        """The same as an ordinary dictionary."""
        return dict(dict.items(self))


def stop_watching(module: nn.Module) -> None:
    """Give a module an ordinary `_parameters` again."""
    if isinstance(module._parameters, OnAccess):
        module._parameters = module._parameters.plain()
