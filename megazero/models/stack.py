"""A row of blocks, run with recomputation as asked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megazero.models.context import Context
from megazero.parallel.recompute import Recompute, checkpoint


def run_blocks(blocks: Sequence[nn.Module], x: Tensor, context: Context, recompute: Recompute) -> Tensor:
    """x [b, s, h] through the blocks of one stage, in order."""

    def run(x: Tensor, chunk: Sequence[nn.Module]) -> Tensor:
        for block in chunk:
            x = block(x, context)
        return x

    if recompute.granularity != "full":
        return run(x, blocks)
    size, last = recompute.num_layers, len(blocks)
    if recompute.method == "block":
        size, last = 1, min(recompute.num_layers, len(blocks))
    for first in range(0, last, size):
        chunk = blocks[first : first + size]
        x = checkpoint(run, x, chunk, saved=recompute.saved, preserve_rng_state=False)
    return run(x, blocks[last:])
