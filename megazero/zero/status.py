"""What scripts written for DeepSpeed ask a parameter of stage 3 (attributes of the parameter, as there).

    ds_shape  ds_numel   of the whole parameter. Every parameter of a stage 3 engine has them
    ds_id                a number of its own, in the order in which parameters were cut: only while it is in slices
    ds_status            AVAILABLE while it is whole, else NOT_AVAILABLE: likewise

`hasattr(p, "ds_id")` thus means: gather it before you read it. What stays whole (small parameters, one rank) has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from itertools import count

from torch import Tensor
from torch.nn import Parameter

_IDS = count()


class ZeroParamStatus(Enum):
    """Where a parameter's values are. `INFLIGHT` is DeepSpeed's; here such a parameter is not available yet."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def describe(parameters: Iterable[Tensor]) -> None:
    """Note the shape and the number of elements of each."""
    for parameter in parameters:
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()  # type: ignore[attr-defined]


def mark(parameter: Tensor) -> None:
    """It has been cut: it shows its shape and no values."""
    describe([parameter])
    if not hasattr(parameter, "ds_id"):
        parameter.ds_id = next(_IDS)  # type: ignore[attr-defined]
    set_available(parameter, False)


def unmark(parameter: Tensor) -> None:
    """It is in slices no more."""
    for name in ("ds_id", "ds_status", "ds_shape", "ds_numel"):
        if hasattr(parameter, name):
            delattr(parameter, name)


def set_available(parameter: Tensor, value: bool) -> None:
    """Whether a parameter that has been cut is whole for now."""
    status = ZeroParamStatus.AVAILABLE if value else ZeroParamStatus.NOT_AVAILABLE
    parameter.ds_status = status  # type: ignore[attr-defined]


def is_available(parameter: Tensor) -> bool:
    """Whether its values can be read. True for one that has not been cut."""
    return getattr(parameter, "ds_status", ZeroParamStatus.AVAILABLE) is ZeroParamStatus.AVAILABLE


def in_order(parameters: Iterable[Parameter]) -> list[Parameter]:
    """The same, those in slices in an order that is the same on every rank, even if they come out of a set."""
    return sorted(parameters, key=lambda parameter: getattr(parameter, "ds_id", -1))
