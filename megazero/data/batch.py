"""A micro-batch: samples stacked into tensors, or the part of each sample that one context-parallel rank works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megazero.data.sample import Sample


@dataclass(frozen=True)
class Batch:
    """b samples of s tokens."""

    tokens: Tensor
    """int64 [b, s], inputs."""
    labels: Tensor
    """int64 [b, s], the token after each input."""
    loss_mask: Tensor
    """float32 [b, s], 1 where the label counts in the loss."""
    position_ids: Tensor
    """int64 [b, s]."""
    document_ids: Tensor | None
    """int32 [b, s], equal for tokens that may see each other; None: all of a sample may."""
    sample_index: Tensor
    """int64 [b], each sample's place in its global batch, whatever the layout."""

    def part(self, places: Tensor) -> Batch:
        """The tokens at these places of each sample, int64 [s/cp]: [b, s] becomes [b, s/cp].

        Document ids stay whole, since who sees whom takes those of the tokens elsewhere too.
        """
        cut = ("tokens", "labels", "loss_mask", "position_ids")
        return replace(self, **{name: getattr(self, name)[:, places] for name in cut})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to a GPU overlaps with its work."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{name: change(value) for name, value in vars(self).items() if value is not None})


def stack(samples: Sequence[Sample], places: Sequence[int]) -> Batch:
    """A micro-batch of samples; `places`: where each stands in the global batch."""
    first = samples[0]

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))

    return Batch(
        tokens=tensor("tokens"),
        labels=tensor("labels"),
        loss_mask=tensor("loss_mask"),
        position_ids=tensor("position_ids"),
        document_ids=None if first.document_ids is None else tensor("document_ids"),
        sample_index=torch.tensor(list(places), dtype=torch.int64),
    )
