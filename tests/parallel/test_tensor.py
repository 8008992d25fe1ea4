"""Tensor-parallel layers on 2 and 4 ranks against nn.Linear and nn.Embedding: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megazero.parallel.collectives import all_gather, all_reduce
from megazero.parallel.random import initial_values
from megazero.parallel.sharding import spec_of
from megazero.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    enter_tensor_parallel,
    gather_columns,
    leave_tensor_parallel,
)
from megazero.parallel.topology import Topology

IN, OUT, ROWS = 8, 12, 20
LAYERS = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


def logical(name: str, *shape: int) -> Tensor:
    """The same values on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + sum(shape)))


def fill(module: nn.Module) -> dict[str, Tensor]:
    """Give the parameters memory and their part of `logical`; return the logical tensors, which want gradients."""
    wholes = {}
    for name, old in list(module.named_parameters()):
        spec = spec_of(name, old)
        wholes[name] = logical(spec.name, *spec.shape).requires_grad_()
        new = nn.Parameter(spec.local(wholes[name].detach()).clone())
        new.shard_spec = spec
        module._parameters[name] = new
    return wholes


def check_gradients(module: nn.Module, wholes: dict[str, Tensor], copies: int = 1) -> None:
    """Each rank's gradient is its box of the logical one; where heads are copied, after the sum over the copies."""
    for name, parameter in module.named_parameters():
        spec = spec_of(name, parameter)
        gradient = parameter.grad.clone()
        if spec.grad_sum is not None:
            all_reduce(gradient, spec.grad_sum)
        assert (spec.grad_sum is not None) == (copies > 1)
        torch.testing.assert_close(gradient, spec.local(wholes[name].grad), rtol=1e-5, atol=1e-5)


def check_column(bias: bool) -> None:
    topology = Topology.build(tp=torch.distributed.get_world_size())
    tp = topology.group("tp")
    layer = ColumnParallelLinear("column", IN, OUT, topology, bias=bias, init_std=0.1)
    wholes = fill(layer)
    x, grad = logical("x", 2, 3, IN).requires_grad_(), logical("grad", 2, 3, OUT)
    expected = F.linear(x, wholes["weight"], wholes.get("bias"))
    expected.backward(grad)
    mine = x.detach().clone().requires_grad_()
    out = layer(mine)
    assert out.shape == (2, 3, OUT // tp.size) and layer.out_features == OUT // tp.size
    torch.testing.assert_close(gather_columns(out, tp), expected, rtol=1e-5, atol=1e-5)
    out.backward(grad.chunk(tp.size, -1)[tp.rank])
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-5, atol=1e-5)
    check_gradients(layer, wholes)


def check_row(bias: bool) -> None:
    topology = Topology.build(tp=torch.distributed.get_world_size())
    tp = topology.group("tp")
    layer = RowParallelLinear("row", IN, OUT, topology, bias=bias, init_std=0.1)
    wholes = fill(layer)
    x, grad = logical("x", 2, 3, IN).requires_grad_(), logical("grad", 2, 3, OUT)
    expected = F.linear(x, wholes["weight"], wholes.get("bias"))
    expected.backward(grad)
    mine = x.detach().chunk(tp.size, -1)[tp.rank].clone().requires_grad_()
    assert layer.in_features == mine.shape[-1]
    out = layer(mine)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.backward(grad)
    torch.testing.assert_close(mine.grad, x.grad.chunk(tp.size, -1)[tp.rank], rtol=1e-5, atol=1e-5)
    check_gradients(layer, wholes)
    if bias:  # replicated: equal on all ranks, the first owns it for the clip
        assert spec_of("bias", layer.bias).replicas == tp.ranks


def check_embedding() -> None:
    topology = Topology.build(tp=torch.distributed.get_world_size())
    layer = VocabParallelEmbedding("embedding", ROWS, IN, topology, init_std=0.1)
    wholes = fill(layer)
    ids = torch.tensor([[0, 19, 4, 5], [9, 10, 4, 15]])  # both ends of every rank's rows, one id twice
    grad = logical("grad", 2, 4, IN)
    expected = F.embedding(ids, wholes["weight"])
    expected.backward(grad)
    out = layer(ids)
    assert torch.equal(out, expected)
    out.backward(grad)
    check_gradients(layer, wholes)


def check_copies(copies: int) -> None:
    """Key/value rows that `copies` neighbours share: each rank uses them for other queries, so gradients add up."""
    topology = Topology.build(tp=torch.distributed.get_world_size())
    tp = topology.group("tp")
    layer = ColumnParallelLinear("kv", IN, OUT, topology, bias=True, init_std=0.1, copies=copies)
    wholes = fill(layer)
    parts = tp.size // copies
    x = logical("x", 2, 3, IN).requires_grad_()
    grads = [logical("g" * (rank + 1), 2, 3, OUT // parts) for rank in range(tp.size)]
    whole = F.linear(x, wholes["weight"], wholes["bias"]).chunk(parts, -1)
    torch.autograd.backward([whole[rank // copies] for rank in range(tp.size)], grads)
    mine = x.detach().clone().requires_grad_()
    out = layer(mine)
    torch.testing.assert_close(out, whole[tp.rank // copies].detach(), rtol=1e-5, atol=1e-5)
    out.backward(grads[tp.rank])
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-5, atol=1e-5)
    check_gradients(layer, wholes, copies)
    first = tp.rank // copies * copies
    assert spec_of("weight", layer.weight).replicas == tp.ranks[first : first + copies]


def check_enter_and_leave() -> None:
    """Conjugate: identity and all-reduce, all-reduce and identity."""
    topology = Topology.build(tp=torch.distributed.get_world_size())
    group = topology.group("tp")
    size = group.size
    x = torch.full((3,), 2.0, requires_grad=True)
    entered = enter_tensor_parallel(x, topology)
    assert torch.equal(entered, x)
    entered.backward(torch.full((3,), group.rank + 1.0))
    assert x.grad.tolist() == [size * (size + 1) / 2] * 3
    y = torch.full((3,), float(group.rank), requires_grad=True)
    total = leave_tensor_parallel(y * 2, topology)
    assert total.tolist() == [size * (size - 1.0)] * 3
    total.backward(torch.full((3,), group.rank + 1.0))
    assert y.grad.tolist() == [2 * (group.rank + 1.0)] * 3


def check_sequence_parallel() -> None:
    """Conjugate along the sequence: gather and reduce-scatter, reduce-scatter and gather."""
    world = torch.distributed.get_world_size()
    topology = Topology.build(tp=world, sequence_parallel=True)
    rank = topology.group("tp").rank
    x = torch.full((2, 1, 4), float(rank), requires_grad=True)
    entered = enter_tensor_parallel(x, topology)
    assert entered[0, :, 0].tolist() == [float(other) for other in range(world)]
    entered.backward(torch.arange(world).float().view(1, -1, 1).expand(2, world, 4) * (rank + 1))
    assert x.grad.unique().tolist() == [rank * world * (world + 1) / 2]
    y = torch.arange(world).float().view(1, -1, 1).repeat(2, 1, 4).requires_grad_()
    left = leave_tensor_parallel(y * 1, topology)
    assert left.shape == (2, 1, 4) and left.unique().tolist() == [float(rank * world)]
    left.backward(torch.full((2, 1, 4), float(rank)))
    assert y.grad[0, :, 0].tolist() == [float(other) for other in range(world)]


def check_gather_columns() -> None:
    group = Topology.build(tp=torch.distributed.get_world_size()).group("tp")
    mine = torch.full((2, 1), float(group.rank), requires_grad=True)
    whole = gather_columns(mine, group)
    assert whole.tolist() == [[float(rank) for rank in range(group.size)]] * 2
    assert not whole.requires_grad
    assert torch.equal(whole, all_gather(mine.detach(), group, 1))


def check_layers() -> None:
    for bias in (False, True):
        check_column(bias)
        check_row(bias)
    check_embedding()
    check_gather_columns()
    for copies in (2, torch.distributed.get_world_size()):
        check_copies(copies)


@pytest.mark.parametrize("tp", [2, 4])
def test_layers_equal_torchs(ranks: Any, tp: int) -> None:
    ranks.run(check_layers, tp)


def test_enter_and_leave(ranks: Any) -> None:
    ranks.run(check_enter_and_leave, 3)
    ranks.run(check_sequence_parallel, 3)


def test_one_rank_is_torchs() -> None:
    topology = Topology.single()
    x, ids = logical("x", 2, IN), torch.tensor([0, 19])
    column = ColumnParallelLinear("c", IN, OUT, topology, bias=True, init_std=0.1)
    row = RowParallelLinear("r", IN, OUT, topology, bias=True, init_std=0.1)
    embedding = VocabParallelEmbedding("e", ROWS, IN, topology, init_std=0.1)
    for layer, function in [(column, F.linear), (row, F.linear)]:
        fill(layer)
        assert torch.equal(layer(x), function(x, layer.weight, layer.bias))
    fill(embedding)
    assert torch.equal(embedding(ids), F.embedding(ids, embedding.weight))


def test_layers_are_not_torchs_classes() -> None:
    """A library that treats them as nn.Linear would train wrong adapters silently."""
    for layer in LAYERS:
        assert not issubclass(layer, nn.Linear | nn.Embedding)


def test_parameters_are_made_on_meta_with_a_spec() -> None:
    layer = ColumnParallelLinear("a.b", IN, OUT, Topology.single(), bias=True, init_std=0.3)
    assert layer.weight.is_meta and layer.bias.is_meta
    weight, bias = spec_of("", layer.weight), spec_of("", layer.bias)
    assert (weight.name, weight.shape, weight.init_std) == ("a.b.weight", (OUT, IN), 0.3)
    assert (bias.name, bias.shape) == ("a.b.bias", (OUT,))
    assert not initial_values(bias, 0).any()


def test_sizes_that_do_not_divide_are_an_internal_error() -> None:
    topology = Topology.fake(2, tp=2)
    try:
        with pytest.raises(AssertionError, match="does not divide into 2"):
            ColumnParallelLinear("c", IN, 7, topology, bias=False, init_std=0.1)
    finally:
        torch.distributed.destroy_process_group()
