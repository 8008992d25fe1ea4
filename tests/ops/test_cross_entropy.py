"""The three numbers per token, combined over parts of the vocabulary, against F.cross_entropy."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from megazero.ops.cross_entropy import cross_entropy_reference, exponentiate_, softmax_gradient_

T, V = 6, 10


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(T, V, generator=generator) * 5
    labels = torch.randint(0, V, (T,), generator=generator)
    return logits, labels, torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 2.0])


def test_reference_is_a_masked_sum() -> None:
    logits, labels, mask = example()
    by_hand = sum(m * (row.exp().sum().log() - row[y]) for row, y, m in zip(logits, labels, mask, strict=True))
    assert cross_entropy_reference(logits, labels, mask).item() == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("cuts", [[0, 10], [0, 5, 10], [0, 1, 7, 10], [0, 0, 10, 10]])  # the last: empty parts
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])  # exp of these overflows or vanishes without the maximum
def test_parts_combine_to_the_whole(cuts: list[int], shift: float) -> None:
    logits, labels, mask = example()
    logits = (logits + shift).requires_grad_()
    loss = (F.cross_entropy(logits, labels, reduction="none") * mask).sum()
    (expected,) = torch.autograd.grad(loss, logits)
    parts = []
    for start, stop in pairwise(cuts):
        here = (labels >= start) & (labels < stop)
        columns = (labels - start).masked_fill(~here, 0)
        block = logits.detach()[:, start:stop].clone()
        parts.append((block, columns, here, exponentiate_(block, columns, here)))
    numbers = torch.stack([part[3] for part in parts])  # [parts, 3, T]
    maximum = numbers[:, 0].amax(0)
    log_sum = maximum + (numbers[:, 1] * (numbers[:, 0] - maximum).exp()).sum(0).log()
    got = ((log_sum - numbers[:, 2].sum(0)) * mask).sum()
    torch.testing.assert_close(got, loss.detach(), rtol=1e-5, atol=1e-4)
    gradient = [softmax_gradient_(e, mask * (own[0] - log_sum).exp(), c, h, mask) for e, c, h, own in parts]
    tolerance = 1e-6 if shift == 0 else 1e-4  # the logits themselves are rounded to 3e-5
    torch.testing.assert_close(torch.cat(gradient, dim=1), expected, rtol=1e-4, atol=tolerance)
