"""Context parallelism: each sequence split over the cp axis, so that every rank has equal work under a causal mask.

    cp = 2, chunks of s / 4 tokens      0 │ 1 │ 2 │ 3         rank r holds chunks r and 2·cp - 1 - r
                                  rank  0 │ 1 │ 1 │ 0

Everything but attention works on the tokens that are here. Attention sees the whole sequence by one of two ways: ring
(p2p: keys and values go round, parallel/ring.py) or Ulysses (a2a: heads for tokens, parallel/ulysses.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megazero.parallel.topology import AxisGroup


def local_places(seq_length: int, group: AxisGroup) -> Tensor:
    """Where in its sequence each token of this rank stands: int64 [s / cp], ascending."""
    return torch.cat([torch.arange(seq_length).chunk(2 * group.size)[chunk] for chunk in _chunks(group.rank, group)])


def ring_order(seq_length: int, group: AxisGroup, device: torch.device) -> Tensor:
    """The places of rank 0's tokens, then rank 1's, …: int64 [s]."""
    chunks = torch.arange(seq_length, device=device).chunk(2 * group.size)
    return torch.cat([chunks[chunk] for rank in range(group.size) for chunk in _chunks(rank, group)])


def ring_document_mask(document_ids: Tensor, places: Tensor, group: AxisGroup) -> Tensor:
    """Who may see whom in packed samples, for the queries here and the keys of all ranks in ring order.

    document_ids [b, s] of the whole sequences, places [s / cp] of the tokens here -> bool [b, 1, s / cp, s].
    """
    order = ring_order(document_ids.shape[1], group, document_ids.device)
    same = document_ids[:, places].unsqueeze(2) == document_ids[:, order].unsqueeze(1)
    return (same & (places.unsqueeze(1) >= order)).unsqueeze(1)


def _chunks(rank: int, group: AxisGroup) -> tuple[int, int]:
    return rank, 2 * group.size - 1 - rank
