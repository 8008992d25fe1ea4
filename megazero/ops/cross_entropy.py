"""Cross-entropy over a part of the vocabulary.

    loss = log Σⱼ exp(zⱼ) - z_target,    dz = softmax(z) - onehot(target)

One device sees some columns of the logits. It gives the three numbers per token from which the whole softmax follows
(maximum, sum of exponentials relative to it, target's logit if it is here); megazero.parallel.cross_entropy combines
them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_reference(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum of token losses: logits [T, V], labels int64 [T], loss_mask [T] -> scalar fp32."""
    return (F.cross_entropy(logits.float(), labels, reduction="none") * loss_mask.float()).sum()


def exponentiate_(logits: Tensor, columns: Tensor, here: Tensor) -> Tensor:
    """Replace fp32 logits [T, v] by exp(logits - their row's maximum); return [3, T]: maximum, sum, target's logit.

    Args:
        columns: the target's column, int64 [T]; any valid column where it is not here.
        here: bool [T], whether the target is among these columns.
    """
    if logits.shape[1] == 0:  # a rank that holds padding only
        empty = torch.zeros(3, logits.shape[0], device=logits.device)
        empty[0] = -torch.inf
        return empty
    target = logits.gather(1, columns.unsqueeze(1)).squeeze(1).masked_fill_(~here, 0.0)
    maximum = logits.amax(dim=1)
    total = logits.sub_(maximum.unsqueeze(1)).exp_().sum(dim=1)
    return torch.stack([maximum, total, target])


def softmax_gradient_(exponentials: Tensor, scale: Tensor, columns: Tensor, here: Tensor, loss_mask: Tensor) -> Tensor:
    """Turn `exponentiate_`'s result into the loss's gradient by the logits, in place.

    `scale` [T] is loss_mask · exp(own maximum - log-sum-exp of the whole row).
    """
    gradient = exponentials.mul_(scale.unsqueeze(1))
    if gradient.shape[1]:
        gradient.scatter_add_(1, columns.unsqueeze(1), (-loss_mask * here).unsqueeze(1))
    return gradient
