"""The losses against plain loops over rows and tokens, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megazero.rlhf import (
    advantages_and_returns,
    kl_rewards,
    pairwise_loss,
    policy_loss,
    span_loss,
    token_log_probs,
    value_loss,
)

LENGTHS = [5, 1, 3]
"""Of the answers: one is whole, one has a single token."""
MASK = (torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)).long()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# reward model


def test_pairwise_loss() -> None:
    chosen, rejected = draw(4), draw(4, seed=1)
    wanted = [-math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert float(pairwise_loss(chosen, rejected)) == pytest.approx(sum(wanted) / 4, rel=1e-6)
    assert float(pairwise_loss(chosen, rejected, 0.5)) == pytest.approx(float(pairwise_loss(chosen, rejected + 0.5)))
    assert pairwise_loss(chosen.bfloat16(), rejected.bfloat16()).dtype == torch.float32


def test_pairwise_loss_where_sigmoid_underflows() -> None:
    chosen = torch.tensor([-1000.0, 0.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(2))
    loss.backward()
    assert loss.item() == pytest.approx((1000 + math.log(2)) / 2)
    assert chosen.grad is not None and chosen.grad.tolist() == pytest.approx([-0.5, -0.25])


def span_by_loop(chosen: Tensor, rejected: Tensor, c_ids: Tensor, r_ids: Tensor, pad: int, begin: int) -> Tensor:
    """Row by row, as DeepSpeed-Chat does it."""
    losses = []
    for c, r, ci, ri in zip(chosen, rejected, c_ids.tolist(), r_ids.tolist(), strict=True):
        ends = []
        for ids in (ci, ri):
            pads = [place for place, token in enumerate(ids) if token == pad]
            ends.append(pads[begin] if len(pads) > begin else len(ids))
        different = [place for place in range(len(ci)) if ci[place] != ri[place]]
        span = slice(different[0], max(ends)) if different else slice(len(ci) - 1, len(ci))
        losses.append(torch.stack([torch.log1p(torch.exp(-(x - y))) for x, y in zip(c[span], r[span], strict=True)]))
    return torch.stack([each.mean() for each in losses]).mean()


@pytest.mark.parametrize("begin", [0, 1])
def test_span_loss_and_its_gradient(begin: int) -> None:
    chosen = torch.tensor([[5, 6, 7, 8, 0, 0], [5, 6, 7, 0, 0, 0], [5, 6, 7, 8, 9, 9], [5, 6, 0, 0, 0, 0]])
    rejected = torch.tensor([[5, 6, 8, 0, 0, 0], [5, 6, 7, 9, 9, 0], [5, 9, 7, 8, 9, 9], [5, 6, 0, 0, 0, 0]])
    if begin:  # texts that begin with the pad token
        chosen, rejected = (torch.cat([torch.zeros(4, 1, dtype=torch.int64), ids], 1) for ids in (chosen, rejected))
    a, b = (draw(*chosen.shape, seed=seed).requires_grad_() for seed in (0, 1))
    loss, wanted = span_loss(a, b, chosen, rejected, 0, begin), span_by_loop(a, b, chosen, rejected, 0, begin)
    torch.testing.assert_close(loss, wanted)
    for found, expected in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(wanted, (a, b)), strict=True):
        torch.testing.assert_close(found, expected)


def test_span_loss_of_texts_padded_on_the_left() -> None:
    ids = torch.tensor([[0, 5, 6]])
    with pytest.raises(ValueError, match=r"pair 0 differs first at token 2, after its padding begins at 0. Pad texts"):
        span_loss(draw(1, 3), draw(1, 3), ids, torch.tensor([[0, 5, 7]]), 0)


# log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs(temperature: float) -> None:
    logits, ids = draw(2, 4, 7).requires_grad_(), torch.tensor([[0, 1, 6, 2], [3, 3, 3, 0]])
    found = token_log_probs(logits, ids, temperature)
    wanted = (logits[:, :-1] / temperature).log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, wanted)
    weights = draw(2, 3, seed=1)
    gradients = [torch.autograd.grad((each * weights).sum(), logits)[0] for each in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_token_log_probs_by_finite_differences() -> None:
    logits, ids = draw(2, 3, 5).double().requires_grad_(), torch.tensor([[0, 1, 4], [3, 3, 2]])
    assert torch.autograd.gradcheck(lambda z: token_log_probs(z, ids, 0.5), logits)


def test_token_log_probs_of_16_bit_logits_are_summed_in_fp32() -> None:
    logits = draw(1, 3, 5000).bfloat16()
    ids = torch.tensor([[0, 1, 4]])
    found = token_log_probs(logits, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_log_probs(logits.float(), ids))


# PPO


def rewards_by_loop(lp: Tensor, ref: Tensor, scores: Tensor, kl: float, clip: float) -> Tensor:
    rewards = torch.zeros(3, 5)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            rewards[row, t] = -kl * (lp[row, t] - ref[row, t])
        rewards[row, length - 1] += min(max(float(scores[row]), -clip), clip)
    return rewards


def gae_by_loop(values: Tensor, rewards: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.zeros(3, 5), torch.zeros(3, 5)
    for row, length in enumerate(LENGTHS):
        last = 0.0
        for t in reversed(range(length)):
            following = float(values[row, t + 1]) if t + 1 < length else 0.0
            last = float(rewards[row, t]) + gamma * following - float(values[row, t]) + gamma * lam * last
            advantages[row, t], returns[row, t] = last, last + float(values[row, t])
    return advantages, returns


def test_rewards() -> None:
    scores = torch.tensor([2.0, 9.0, -9.0])
    found = kl_rewards(draw(3, 5), draw(3, 5, seed=1), scores, MASK, 0.1, 5.0)
    torch.testing.assert_close(found, rewards_by_loop(draw(3, 5), draw(3, 5, seed=1), scores, 0.1, 5.0))
    assert float(found[1, 0]) > 4 and not found[1, 1:].any()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_advantages_and_returns(gamma: float, lam: float) -> None:
    values, rewards = draw(3, 5), draw(3, 5, seed=1)
    wanted = gae_by_loop(values, rewards, gamma, lam)
    for found, expected in zip(advantages_and_returns(values, rewards, MASK, gamma, lam), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def chat_gae(values: Tensor, rewards: Tensor, scores: Tensor) -> Tensor:
    """As DeepSpeed-Chat's loops have it where each answer fills its place: rewards without scores [b, t]."""
    rewards = rewards.clone()
    rewards[:, -1] += scores
    last, found = torch.zeros(len(values)), []
    for t in reversed(range(5)):
        following = values[:, t + 1] if t < 4 else torch.zeros(len(values))
        last = rewards[:, t] + following - values[:, t] + 0.95 * last
        found.append(last)
    return torch.stack(found[::-1], 1)


def test_whole_answers_are_as_in_deepspeed_chat() -> None:
    values, log_probs, scores, whole = draw(3, 5), draw(3, 5, seed=1), draw(3, seed=2), torch.ones(3, 5)
    rewards = kl_rewards(log_probs, torch.zeros(3, 5), scores, whole, 0.1, 5.0)
    wanted = chat_gae(values, -0.1 * log_probs, scores)
    torch.testing.assert_close(advantages_and_returns(values, rewards, whole)[0], wanted)


def test_policy_loss() -> None:
    new, old, advantages = 0.3 * draw(3, 5), 0.3 * draw(3, 5, seed=1), draw(3, 5, seed=2)
    wanted = 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            ratio, advantage = math.exp(float(new[row, t] - old[row, t])), float(advantages[row, t])
            wanted += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
    total, count = policy_loss(new, old, advantages, MASK)
    assert float(total) == pytest.approx(wanted, rel=1e-5) and int(count) == 9


def test_value_loss() -> None:
    new, old, returns = draw(3, 5), draw(3, 5, seed=1), draw(3, 5, seed=2)
    wanted = 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            value, before, goal = float(new[row, t]), float(old[row, t]), float(returns[row, t])
            wanted += 0.5 * max((value - goal) ** 2, (min(max(value, before - 0.2), before + 0.2) - goal) ** 2)
    total, count = value_loss(new, old, returns, MASK)
    assert float(total) == pytest.approx(wanted, rel=1e-5) and int(count) == 9


def test_what_is_outside_the_mask_changes_nothing() -> None:
    """Neither does a number there that is not finite, in the loss or in its gradient."""
    outside = MASK == 0
    x = [draw(3, 5, seed=seed) for seed in range(3)]
    for loss in (policy_loss, value_loss):
        results = []
        for filler in (0.0, math.inf):
            first = x[0].masked_fill(outside, filler).requires_grad_()
            total, _ = loss(first, *(each.masked_fill(outside, 0.0) for each in x[1:]), MASK)
            total.backward()
            assert first.grad is not None
            results.append((total.item(), first.grad.masked_fill(outside, 0.0)))
        assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
