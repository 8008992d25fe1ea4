"""The losses of reward models and of PPO, as functions of tensors; computed in fp32.

    reward model   -log σ(chosen - rejected)                                          Christiano 2017, Ouyang 2022
    rewards        rₜ = -β (log π(aₜ) - log π_ref(aₜ)),  + clip(score) at the answer's last token      Ouyang 2022
    GAE            δₜ = rₜ + γ Vₜ₊₁ - Vₜ,  Aₜ = δₜ + γλ Aₜ₊₁,  returns Aₜ + Vₜ                      Schulman 2016
    policy         max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)),  ρ = π(a) / π_old(a)                        Schulman 2017
    value          ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)               OpenAI baselines' ppo2

[b, t] are the positions of the answers, padded on the right; `mask` is 1 for their tokens. Policy and value loss come
as (sum, count), so that a step is a mean over the tokens of all ranks and micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megazero.rlhf.padding import first


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None) -> Tensor:
    """Mean of -log σ(chosen - rejected - margin) over pairs: scores [b] -> scalar."""
    difference = chosen.float() - rejected.float()
    return -F.logsigmoid(difference if margin is None else difference - margin).mean()


def span_loss(
    chosen_values: Tensor,
    rejected_values: Tensor,
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    pad: int,
    num_padding_at_beginning: int = 0,
) -> Tensor:
    """DeepSpeed-Chat's reward loss: of each pair the mean of -log σ(chosen - rejected) over the positions from the
    first that differs to the end of the longer text; of these the mean over pairs. Pairs that do not differ: their
    last position alone.

    Args:
        chosen_values, rejected_values: of each token [b, s].
        chosen_ids, rejected_ids: int64 [b, s], padded on the right.
        num_padding_at_beginning: how many pads each text begins with.

    Raises ValueError for a pair that ends before it differs.
    """
    length = chosen_ids.shape[1]
    differs = first(chosen_ids != rejected_ids)  # [b]
    ends = torch.maximum(*(_end(ids, pad, num_padding_at_beginning) for ids in (chosen_ids, rejected_ids)))
    same = differs == length
    begin, end = differs.where(~same, length - 1), ends.where(~same, length)
    if bool((begin >= end).any()):
        row = int((begin >= end).int().argmax())
        raise ValueError(
            f"span_loss: pair {row} differs first at token {int(begin[row])}, after its padding begins at "
            f"{int(end[row])}. Pad texts on the right, and say num_padding_at_beginning if they begin with the pad."
        )
    place = torch.arange(length, device=chosen_ids.device)
    span = (place >= begin.unsqueeze(1)) & (place < end.unsqueeze(1))
    losses = -F.logsigmoid(chosen_values.float() - rejected_values.float())
    return (torch.where(span, losses, 0.0).sum(1) / span.sum(1)).mean()


def _end(ids: Tensor, pad: int, at_beginning: int) -> Tensor:
    """Where each text ends: at its pad number `at_beginning`, counted from 0; [b, s] -> [b]."""
    pads = ids == pad
    return first(pads & (pads.cumsum(1) == at_beginning + 1))


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at each next token: logits [b, s, V], ids int64 [b, s] -> fp32 [b, s - 1].

    16-bit logits are taken to fp32 a row at a time, forward and backward.
    """
    found: Tensor = _TokenLogProbs.apply(logits[:, :-1], ids[:, 1:], temperature)
    return found


class _TokenLogProbs(torch.autograd.Function):
    """z/T at the token minus logsumexp(z/T); its gradient (onehot - softmax) / T."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.stack([torch.logsumexp(row.to(wide) / temperature, -1) for row in logits])  # [b, t]
        ctx.save_for_backward(logits, ids, total)
        ctx.temperature = temperature
        return logits.gather(2, ids.unsqueeze(2)).squeeze(2).to(wide) / temperature - total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logits, ids, total = ctx.saved_tensors
        scaled = gradients[0].unsqueeze(2) / ctx.temperature  # [b, t, 1]
        result = torch.empty_like(logits)
        for row in range(logits.shape[0]):
            part = (logits[row].to(total.dtype) / ctx.temperature - total[row].unsqueeze(1)).exp_() * -scaled[row]
            result[row] = part.scatter_add_(1, ids[row].unsqueeze(1), scaled[row])
        return result, None, None


def kl_rewards(
    log_probs: Tensor, ref_log_probs: Tensor, scores: Tensor, mask: Tensor, kl_ctl: float, clip_reward_value: float
) -> Tensor:
    """What each token earned: log_probs, ref_log_probs, mask [b, t], scores [b] -> fp32 [b, t], 0 outside the mask."""
    rewards = -kl_ctl * (log_probs.float() - ref_log_probs.float())
    final = (mask != 0) & (mask.flip(1).cumsum(1).flip(1) == 1)  # the last 1 of each row
    clipped = scores.float().clamp(-clip_reward_value, clip_reward_value)
    return torch.where(mask != 0, rewards, 0.0) + final * clipped.unsqueeze(1)


def advantages_and_returns(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates, and the returns that values are to learn: all fp32 [b, t], 0 outside the mask.

    An answer ends with its last token: what follows is worth nothing.
    """
    inside = mask != 0
    values, rewards = torch.where(inside, values.float(), 0.0), torch.where(inside, rewards.float(), 0.0)
    following = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantage, found = torch.zeros_like(values[:, 0]), []
    for delta in reversed(deltas.unbind(1)):
        advantage = delta + gamma * lam * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    return torch.where(inside, advantages, 0.0), torch.where(inside, advantages + values, 0.0)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float = 0.2
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, [b, t] each: (sum over the masked tokens, how many they are)."""
    inside = mask != 0
    ratio = torch.where(inside, log_probs.float() - old_log_probs.float(), 0.0).exp()
    clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    return torch.where(inside, losses, 0.0).sum(), inside.sum()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float = 0.2
) -> tuple[Tensor, Tensor]:
    """The clipped squared error of values, [b, t] each: (sum over the masked tokens, how many they are)."""
    inside = mask != 0
    values, old_values = values.float(), old_values.float()
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    losses = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
    return torch.where(inside, losses, 0.0).sum(), inside.sum()
