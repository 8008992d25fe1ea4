"""The fused projection and loss against F.cross_entropy: vocabulary parts, chunks, padding, masks, types, memory."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megazero.parallel.collectives import all_reduce
from megazero.parallel.cross_entropy import linear_cross_entropy
from megazero.parallel.topology import AxisGroup, Topology

T, H = 11, 8
VOCABULARIES = [(40, 40), (37, 40), (3, 40)]  # (real, padded): the last leaves some ranks of 2 and 4 with padding only
CHUNKS = [None, 1, 4, 11, 100]


def example(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weight = torch.randn(rows, H, generator=generator).to(dtype)
    labels = torch.randint(0, vocab, (T,), generator=generator)
    labels[:2] = torch.tensor([0, vocab - 1])
    mask = (torch.rand(T, generator=generator) < 0.7).float()
    mask[0], mask[3] = 0.5, 2.0  # weights, not only on and off
    return hidden, weight, labels, mask


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """Loss and gradients of 3 · loss, from the full logits in fp64."""
    wide = [x.double().detach().requires_grad_() for x in (hidden, weight)]
    losses = F.cross_entropy(wide[0] @ wide[1][:vocab].t(), labels, reduction="none")
    loss = (losses * mask).sum()
    return loss.detach(), *torch.autograd.grad(3 * loss, wide)


def ours(group: AxisGroup, vocab: int, chunk: int | None, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of 3 · loss; the weight's is of this rank's rows."""
    hidden, weight, labels, mask = inputs
    rows = weight.shape[0] // group.size
    hidden = hidden.clone().requires_grad_()
    part = weight[group.rank * rows : (group.rank + 1) * rows].clone().requires_grad_()
    loss = linear_cross_entropy(
        hidden, part, labels, mask, vocab_size=vocab, first_row=group.rank * rows, group=group, chunk_tokens=chunk
    )
    assert loss.dtype == torch.float32 and loss.shape == ()
    grad_hidden, grad_part = torch.autograd.grad(3 * loss, [hidden, part])
    return loss.detach(), all_reduce(grad_hidden, group), grad_part


def check_fp32() -> None:
    group = Topology.build(tp=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1).group(
        "tp"
    )
    for (vocab, rows), chunk in product(VOCABULARIES, CHUNKS):
        inputs = example(rows, vocab)
        loss, grad_hidden, grad_weight = ours(group, vocab, chunk, *inputs)
        wanted = expected(*inputs, vocab)
        torch.testing.assert_close(loss.double(), wanted[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad_hidden.double(), wanted[1], rtol=1e-5, atol=1e-5)
        own = wanted[2].chunk(group.size)[group.rank]
        torch.testing.assert_close(grad_weight.double(), own, rtol=1e-5, atol=1e-5)
        padding = slice(max(vocab - group.rank * len(own), 0), None)
        assert not grad_weight[padding].any()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_torchs(ranks: Any, tp: int) -> None:
    ranks.run(check_fp32, tp)


def check_bf16() -> None:
    """The loss is exact for logits rounded to bf16, also summed over many chunks; gradients to bf16's rounding."""
    group = Topology.build(tp=torch.distributed.get_world_size()).group("tp")
    inputs = example(40, 37, torch.bfloat16)
    hidden, weight, labels, mask = inputs
    logits = (hidden @ weight[:37].t()).double()
    exact = (F.cross_entropy(logits, labels, reduction="none") * mask).sum()
    wanted = expected(*inputs, 37)
    for chunk in (None, 1, 3):
        loss, grad_hidden, grad_weight = ours(group, 37, chunk, *inputs)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
        assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
        for got, want in [(grad_hidden, wanted[1]), (grad_weight, wanted[2].chunk(group.size)[group.rank])]:
            assert (got.double() - want).abs().max() / want.abs().max() < 2**-6


def test_bf16(ranks: Any) -> None:
    ranks.run(check_bf16, 2)


def test_bf16_weight_gradient_sums_chunks_in_fp32() -> None:
    """4096 equal tokens in 256 chunks: in bf16 the sum would stop growing at 256 times one chunk's."""
    tokens = 4096
    hidden, weight = torch.full((tokens, 1), 1.0).bfloat16(), torch.tensor([[0.0], [0.0]]).bfloat16()
    labels = torch.zeros(tokens, dtype=torch.int64)
    _, _, grad = ours(Topology.single().group("tp"), 2, 4, hidden, weight, labels, torch.ones(tokens))
    assert grad.flatten().tolist() == [-3 * tokens / 2, 3 * tokens / 2]


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, labels, mask = example(40, 37)
    weight.requires_grad_()
    group = Topology.single().group("tp")
    with torch.no_grad(), Largest() as seen:
        loss = linear_cross_entropy(
            hidden, weight, labels, mask, vocab_size=37, first_row=0, group=group, chunk_tokens=2
        )
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), expected(hidden, weight, labels, mask, 37)[0], rtol=1e-6, atol=1e-6)
    assert seen.numel <= 2 * 37  # not even a gradient of the hidden states


def test_all_masked_is_zero() -> None:
    hidden, weight, labels, mask = example(40, 37)
    loss, grad_hidden, grad_weight = ours(Topology.single().group("tp"), 37, 4, hidden, weight, labels, 0 * mask)
    assert loss == 0 and not grad_hidden.any() and not grad_weight.any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels, mask = example(40, 37)
    inputs = (hidden * 200, weight * 200, labels, mask)
    loss, grad_hidden, _ = ours(Topology.single().group("tp"), 37, 4, *inputs)
    wanted = expected(*inputs, 37)
    torch.testing.assert_close(loss.double(), wanted[0], rtol=1e-5, atol=0)
    assert grad_hidden.isfinite().all()


class Largest(TorchDispatchMode):
    """Number of elements of the largest new tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.numel())
        return out


def check_memory() -> None:
    """Forward and backward by the default chunk: far from T × V, on one rank and on two."""
    tp = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    group = Topology.build(tp=tp).group("tp")
    tokens, vocab, width = 4096, 8192, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab // tp, width, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    with Largest() as seen:
        loss = linear_cross_entropy(
            hidden,
            weight,
            labels,
            torch.ones(tokens),
            vocab_size=vocab,
            first_row=group.rank * vocab // tp,
            group=group,
        )
        loss.backward()
    chunk = 1 << 20
    assert chunk // 2 <= seen.numel <= chunk < tokens * vocab // tp // 8


@pytest.mark.parametrize("tp", [1, 2])
def test_the_full_logits_never_exist(ranks: Any, tp: int) -> None:
    ranks.run(check_memory, tp)


def test_the_meter_sees_full_logits() -> None:
    hidden, weight, labels, _ = example(40, 40)
    with Largest() as seen:
        F.cross_entropy(hidden @ weight.t(), labels)
    assert seen.numel == T * 40
