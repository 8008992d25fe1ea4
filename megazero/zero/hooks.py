"""What ZeRO hangs on a user's module: it can be taken off again, and copies of the module are without it.

module ─ hooks ─► Zero         copy.deepcopy(module), pickle ─► a module whose hooks do nothing
"""

from __future__ import annotations

from functools import partial
from typing import Any


class Hook(partial[Any]):
    """A hook of ZeRO's on a module that is not its own. A copy of it does nothing."""

    def __reduce__(self) -> Any:
        return Idle, ()


class Idle:
    """What a copied module has in the place of a `Hook`."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None
