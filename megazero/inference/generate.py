"""Continue a prompt: sample token by token from a model that gives logits [b, s, vocab].

Every step runs the whole window again (no key/value cache), which is right for a look at a training run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    logits: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    new_tokens: int,
    window: int,
    temperature: float = 0.8,
    top_k: int = 50,
    stop: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[int]:
    """The prompt's ids followed by up to `new_tokens` sampled ones.

    Args:
        logits: tokens int64 [1, s] -> logits [1, s, vocab], equal on all ranks that call this together.
        window: longest sequence the model takes; earlier tokens fall out.
        temperature: 0 takes the likeliest token.
        top_k: sample among so many likeliest tokens.
        stop: end after this id.
        seed: the draws are on the CPU from this seed, so ranks with equal logits sample equal tokens.

    Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("cannot continue an empty prompt: give at least one token, the end-of-document token, say")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(new_tokens):
        tokens = torch.tensor([ids[-window:]], device=device)
        last = logits(tokens)[0, -1].float().cpu()  # [vocab]
        ids.append(_draw(last, temperature, top_k, generator))
        if ids[-1] == stop:
            break
    return ids


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    best, where = logits.topk(min(top_k, logits.numel()))
    chances = (best / temperature).softmax(-1)
    return int(where[torch.multinomial(chances, 1, generator=generator)])
