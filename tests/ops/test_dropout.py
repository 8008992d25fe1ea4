"""Dropout: the right share, the right scale, a mask that depends on the logical place alone, and no visible pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megazero.ops.dropout import Randomness, dropout

B, S, H = 16, 64, 128


def kept(
    samples: Tensor | None = None,
    *,
    seed: int = 1,
    step: int = 0,
    site: str = "model.layers.0.mlp",
    rate: float = 0.25,
    positions: Tensor | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """Where dropout keeps elements: bool [b, s, h] for these samples, positions and channels (all by default)."""
    samples = torch.arange(B) if samples is None else samples
    positions = torch.arange(S) if positions is None else positions
    channels = torch.arange(H) if channels is None else channels
    randomness = Randomness(seed, step, samples)
    coordinates = [samples.view(-1, 1, 1), positions.view(1, -1, 1), channels.view(1, 1, -1)]
    ones = torch.ones(len(samples), len(positions), len(channels))
    return dropout(ones, rate, randomness.key(site), coordinates) != 0


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().float(), b.flatten().float()]))[0, 1])


def test_scale_and_type() -> None:
    x = torch.randn(2, 8, 16, dtype=torch.bfloat16)
    where = [torch.arange(n).view(shape) for n, shape in [(2, (-1, 1, 1)), (8, (1, -1, 1)), (16, (1, 1, -1))]]
    out = dropout(x, 0.25, 3, where)
    assert out.dtype == torch.bfloat16
    zero = out == 0
    assert zero.any() and not zero.all()
    torch.testing.assert_close(out, torch.where(zero, 0, x / 0.75))


def test_backward_drops_the_same_elements() -> None:
    x = torch.ones(B, S, requires_grad=True)
    out = dropout(x, 0.5, 3, [torch.arange(B).view(-1, 1), torch.arange(S).view(1, -1)])
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())


def test_rate_zero_keeps_everything() -> None:
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, 1, []) is x


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share(rate: float) -> None:
    deviation = (rate * (1 - rate) / (B * S * H)) ** 0.5
    share = 1 - float(kept(rate=rate).float().mean())
    assert abs(share - rate) < 5 * deviation
    for dim in (0, 1, 2):  # every sample, position and channel has its share too
        parts = 1 - kept(rate=rate).float().transpose(0, dim).flatten(1).mean(1)
        spread = (rate * (1 - rate) / (B * S * H / len(parts))) ** 0.5
        assert (parts - rate).abs().max() < 5 * spread


def test_any_cut_and_order_of_the_batch_drops_the_same() -> None:
    whole = kept()
    for cut in (1, 3, 8):
        assert torch.equal(torch.cat([kept(part) for part in torch.arange(B).split(cut)]), whole)
    order = torch.randperm(B)
    assert torch.equal(kept(order), whole[order])


def test_any_cut_of_positions_and_channels_drops_the_same() -> None:
    part = kept(positions=torch.arange(S)[20:50], channels=torch.arange(H)[64:])
    assert torch.equal(part, kept()[:, 20:50, 64:])


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = kept()
    state = torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(kept(), before)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"seed": 0},
        {"step": 1},
        {"step": 1000},
        {"site": "model.layers.1.mlp"},
        {"site": "model.layers.0.self_attn"},
    ],
    ids=str,
)
def test_another_seed_step_or_site_draws_anew(other: dict) -> None:
    one, two = kept(), kept(**other)
    assert abs(correlation(one, two)) < 5 / one.numel() ** 0.5


def test_seed_and_step_are_not_interchangeable() -> None:
    assert abs(correlation(kept(seed=1, step=2), kept(seed=2, step=1))) < 5 / (B * S * H) ** 0.5


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 8])
def test_neighbours_are_independent(dim: int, distance: int) -> None:
    mask = kept()
    one, two = mask.narrow(dim, distance, mask.shape[dim] - distance), mask.narrow(dim, 0, mask.shape[dim] - distance)
    assert abs(correlation(one, two)) < 5 / one.numel() ** 0.5


def test_no_two_rows_are_alike() -> None:
    rows = kept(rate=0.5).flatten(0, 1).float() * 2 - 1  # [1024, 128]
    overlap = rows @ rows.t() / H
    overlap.fill_diagonal_(0)
    assert overlap.abs().max() < 0.6  # 6.8 standard deviations


def test_transposed_coordinates_differ() -> None:
    """(position 3, channel 5) is not (position 5, channel 3)."""
    square = kept(positions=torch.arange(S), channels=torch.arange(S))
    off = ~torch.eye(S, dtype=torch.bool).expand_as(square)
    assert abs(correlation(square[off], square.transpose(1, 2)[off])) < 5 / off.sum().item() ** 0.5
