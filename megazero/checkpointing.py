"""Activation checkpointing for your own modules, under the names of `deepspeed.checkpointing`.

    y = checkpoint(block, x)                               # x is kept, block's activations are computed again
    saved = SavedInputs(offload=True, slots=32)            # once
    y = checkpoint(block, x, saved=saved)                  # x is kept in CPU memory, in a buffer for 32 of them

Nothing is global, so there is nothing to configure or reset: where DeepSpeed's `configure` takes partition_activations,
cpu_checkpointing, contiguous_memory_optimization with number_checkpoints, a `SavedInputs` takes partition (the
tensor-parallel group: `topology.group("tp")`), offload and slots.
"""

from __future__ import annotations

from megazero.parallel.recompute import checkpoint
from megazero.parallel.saved_inputs import SavedInputs

__all__ = ["SavedInputs", "checkpoint"]
