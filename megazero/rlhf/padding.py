"""Which tokens of a padded row are real, where they stand, and how a module is told.

ids    pad pad  a  b  c  eos pad        leading run of pads, then tokens up to the first pad after it
mask    0   0   1  1  1   1   0
place   0   0   0  1  2   3   3         cumsum(mask) - 1, so that left padding changes no number
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def first(flags: Tensor) -> Tensor:
    """Index of the first True of each row; the row's length where there is none: bool [b, s] -> int64 [b]."""
    return torch.where(flags.any(1), flags.int().argmax(1), flags.shape[1])


def left_mask(ids: Tensor, pad: int, kept: int = 0) -> Tensor:
    """1 but for the pads that a row begins with, the last `kept` of which are real: ids [b, s] -> int64 [b, s]."""
    begin = (first(ids != pad) - kept).clamp(min=0)
    return (torch.arange(ids.shape[1], device=ids.device) >= begin.unsqueeze(1)).long()


def real_tokens(ids: Tensor, pad: int, kept: int = 0, prompt: int = 0) -> Tensor:
    """1 for tokens between the padding on both sides: ids [b, s] -> int64 [b, s].

    Args:
        kept: so many pads before the first other token are real (OPT's </s>, where that is the pad too).
        prompt: length of the prompt's part, in which no pad ends the row.

    Raises ValueError for a row of pads only.
    """
    others = ids != pad
    if not bool(others.any(1).all()):
        row = int(others.any(1).int().argmin())
        raise ValueError(f"row {row} holds nothing but the pad token {pad}. Leave rows without text out of the batch.")
    place = torch.arange(ids.shape[1], device=ids.device)
    begin = first(others).clamp(min=prompt)
    end = first(~others & (place >= begin.unsqueeze(1)))
    return left_mask(ids, pad, kept) * (place < end.unsqueeze(1))


def checked(mask: Tensor, ids: Tensor) -> Tensor:
    """A mask that was given, as int64 [b, s]. Raises ValueError for another shape and for a row without tokens."""
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}. Give 1 or 0 for each id."
        )
    mask = (mask != 0).long()
    if not bool(mask.any(1).all()):
        row = int(mask.any(1).int().argmin())
        raise ValueError(f"row {row} of the attention mask is 0 throughout. Leave rows without text out of the batch.")
    return mask


def last(mask: Tensor) -> Tensor:
    """Index of each row's last 1: [b, s] -> [b]."""
    return mask.shape[1] - 1 - first(mask.flip(1) != 0)


def positions(mask: Tensor) -> Tensor:
    """Each token's place among its row's real ones: [b, s] -> int64 [b, s]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def without_adapters(module: nn.Module) -> nn.Module:
    """The model inside peft's wrapper, if that is what it is."""
    unwrap: Any = getattr(module, "get_base_model", None)
    inner: nn.Module = unwrap() if callable(unwrap) else module
    return inner


def keywords(module: nn.Module, mask: Tensor) -> dict[str, Any]:
    """What the module's forward takes beside the ids of a padded batch: attention_mask, position_ids, use_cache."""
    taken = inspect.signature(without_adapters(module).forward).parameters
    offered = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    return {name: value for name, value in offered.items() if name in taken}
