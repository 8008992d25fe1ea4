"""Generation: greedy is an argmax loop, the window slides, draws repeat by seed and follow the distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megazero.inference.generate import generate

VOCAB = 16


class Model:
    """Logits that depend on every token of the window and its place; remembers what it was shown."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(64, VOCAB, VOCAB, generator=generator)
        self.seen: list[list[int]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        assert tokens.dtype == torch.int64 and tokens.shape[0] == 1 and not torch.is_grad_enabled()
        self.seen.append(tokens[0].tolist())
        places = torch.arange(tokens.shape[1])
        return self.table[places, tokens[0]].cumsum(0).unsqueeze(0)


def test_greedy_is_an_argmax_loop() -> None:
    got = generate(Model(), [3, 1], new_tokens=12, window=64, temperature=0.0)
    model, ids = Model(), [3, 1]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert got == ids
    assert generate(Model(), [3, 1], new_tokens=12, window=64, temperature=5.0, top_k=1, seed=9) == ids


def test_the_window_slides() -> None:
    model = Model()
    prompt = [5, 6, 7, 8, 9]
    ids = generate(model, prompt, new_tokens=4, window=3, temperature=0.0)
    assert ids[:5] == prompt and len(ids) == 9
    assert model.seen == [ids[at - 3 : at] for at in range(5, 9)]


def test_stops_after_the_stop_token() -> None:
    free = generate(Model(), [3], new_tokens=20, window=64, temperature=0.0)
    stop = free[6]
    first = free.index(stop, 1)
    assert generate(Model(), [3], new_tokens=20, window=64, temperature=0.0, stop=stop) == free[: first + 1]


def test_a_stop_token_in_the_prompt_does_not_count() -> None:
    free = generate(Model(), [3, 4], new_tokens=5, window=64, temperature=0.0)
    absent = next(token for token in range(VOCAB) if token not in free[2:])
    assert len(generate(Model(), [absent, 3], new_tokens=1, window=64, stop=absent)) == 3


def test_the_seed_decides_alone() -> None:
    def text(seed: int) -> list[int]:
        return generate(Model(), [3], new_tokens=30, window=64, temperature=3.0, seed=seed)

    torch.manual_seed(1)
    one = text(0)
    torch.manual_seed(2)
    assert text(0) == one != text(1)


def test_draws_follow_the_k_likeliest_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    ids = generate(
        lambda tokens: logits.expand(1, tokens.shape[1], 4), [0], new_tokens=4000, window=1, temperature=2.0, top_k=3
    )
    counts = torch.bincount(torch.tensor(ids[1:]), minlength=4) / 4000
    wanted = torch.cat([(logits[:3] / 2).softmax(0), torch.zeros(1)])
    assert counts[3] == 0
    torch.testing.assert_close(counts, wanted, rtol=0, atol=0.04)


def test_no_new_tokens() -> None:
    assert generate(Model(), [3, 4], new_tokens=0, window=64) == [3, 4]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt: give at least one token"):
        generate(Model(), [], new_tokens=3, window=64)
