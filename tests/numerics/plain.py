"""The same training in one process and plain torch: what the engine is held against.

fp32        AdamW on the global batch
16 bits     fp32 masters ─cast─► 16-bit copy ─► gradients of one micro-batch, in 16 bits, of loss · scale
            ─► summed in fp32 over micro-batches, then over ranks ─► / (scale · micro-batches) ─► clip ─► AdamW
            on the masters. Dynamic scale: an overflow skips the step and halves it, two clean steps double it
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from tests.numerics.setting import (
    ADAM,
    CLIP,
    DTYPES,
    DYNAMIC,
    SCALE,
    STEPS,
    Outcome,
    Recipe,
    Small,
    batch_of,
    build,
    part_of,
)


@functools.cache
def plain(recipe: Recipe) -> Outcome:
    """Ten steps in one process, with one thread as the ranks have: 16-bit products round by how they are divided."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _whole_batch(recipe.clip) if recipe.precision == "fp32" else _mixed(recipe)
    finally:
        torch.set_num_threads(threads)


def _whole_batch(clip: bool) -> Outcome:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)  # type: ignore[arg-type]
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(*batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP if clip else math.inf)))
        losses.append(float(loss.detach()))
        optimizer.step()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return Outcome(losses, norms, [False] * STEPS, weights)


def _mixed(recipe: Recipe) -> Outcome:
    masters = {name: nn.Parameter(value.detach().clone()) for name, value in build().named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), **ADAM)  # type: ignore[arg-type]
    copy = build().to(DTYPES[recipe.precision])
    scale = {"bf16": 1.0, "fp16": 2.0 ** DYNAMIC["initial_scale_power"] if recipe.dynamic else SCALE}[recipe.precision]
    found = Outcome([], [], [], {})
    updates, last_overflow = 0, -1
    for step in range(STEPS):
        with torch.no_grad():
            for name, weight in copy.named_parameters():
                weight.copy_(masters[name])
        loss, sums = _gradients(copy, recipe, step, scale)
        for name, master in masters.items():
            master.grad = sums[name] / (scale * recipe.accumulation * recipe.ranks)
        norm = float(torch.stack([g.double().square().sum() for g in sums.values()]).sum().sqrt())
        norm /= scale * recipe.accumulation * recipe.ranks
        overflow = not math.isfinite(norm)
        if not overflow:
            if recipe.clip:
                nn.utils.clip_grad_norm_(masters.values(), CLIP)
            optimizer.step()
        if recipe.dynamic:
            if overflow:
                scale, last_overflow = max(scale / 2, 1.0), updates
            elif (clean := updates - last_overflow - 1) > 0 and clean % DYNAMIC["loss_scale_window"] == 0:
                scale *= 2
            updates += 1
        found.losses.append(loss)
        found.norms.append(norm if not overflow else math.nan)
        found.skipped.append(overflow)
    found.weights = {name: master.detach().clone() for name, master in masters.items()}
    return found


def _gradients(copy: Small, recipe: Recipe, step: int, scale: float) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of the global batch, and the sums over micro-batches and ranks of scaled gradients, fp32."""
    total = 0.0
    of_ranks: list[dict[str, Tensor]] = []
    for rank in range(recipe.ranks):
        sums: dict[str, Tensor] = {}
        for micro in range(recipe.accumulation):
            loss = copy(*part_of(step, rank, recipe.ranks, micro, recipe.accumulation))
            copy.zero_grad()
            (loss * scale).backward()
            total += float(loss.detach())
            for name, weight in copy.named_parameters():
                assert weight.grad is not None
                gradient = weight.grad.float()
                sums[name] = sums[name] + gradient if name in sums else gradient
        of_ranks.append(sums)
    names = of_ranks[0]
    summed = {name: functools.reduce(torch.add, (sums[name] for sums in of_ranks)) for name in names}
    return total / (recipe.ranks * recipe.accumulation), summed
