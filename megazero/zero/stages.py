"""ZeRO as one table of lifetimes (Rajbhandari et al., arXiv 1910.02054).

stage   gradients reduced                         kept             optimizer state   parameters between uses
  0     all-reduce at the boundary                full             full              full
  1     reduce-scatter at the boundary            full until then  shard             full; all-gather after the step
  2     reduce-scatter after each backward        shard            shard             full; all-gather after the step
  3     as 2                                      shard            shard             shard; gathered around each use
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetimes:
    """What a stage keeps whole on each rank, and what it shards."""

    optimizer_sharded: bool = False
    gradients_sharded: bool = False
    parameters_sharded: bool = False


STAGES: dict[int, Lifetimes] = {
    0: Lifetimes(),
    1: Lifetimes(optimizer_sharded=True),
    2: Lifetimes(optimizer_sharded=True, gradients_sharded=True),
    3: Lifetimes(optimizer_sharded=True, gradients_sharded=True, parameters_sharded=True),
}
