"""ZeRO as one table of lifetimes (Rajbhandari et al., arXiv 1910.02054).

stage   gradients reduced                optimizer state    parameters
  0     all-reduce at the boundary       full               full
  1     reduce-scatter at the boundary   shard              full; all-gather after the step
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetimes:
    """What a stage keeps whole on each rank, and what it shards."""

    optimizer_sharded: bool


STAGES: dict[int, Lifetimes] = {0: Lifetimes(optimizer_sharded=False), 1: Lifetimes(optimizer_sharded=True)}
