"""Recomputation: the same bits as without, less memory (measured), torch's generators restored, nesting, failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from megazero import checkpointing
from megazero.config.derive import derive
from megazero.config.schema import RunConfig
from megazero.parallel.recompute import KEEP_ALL, Recompute, checkpoint, without_keeping
from megazero.parallel.saved_inputs import SavedInputs
from megazero.parallel.topology import Topology
from tests.config.settings import config_with
from tests.parallel.live_memory import live_bytes

ROWS, WIDTH = 5, 8


class Layer(nn.Module):
    """With torch's own dropout, as user code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.4)
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + self.drop(self.down(torch.nn.functional.gelu(self.up(x)))) * scale


def layers(number: int = 3) -> list[Layer]:
    torch.manual_seed(0)
    return [Layer() for _ in range(number)]


Call = Callable[..., Tensor]


def plain(layer: Call, *args: Any) -> Tensor:
    return layer(*args)


def outcome(call: Callable[..., Tensor], stack: list[Layer]) -> list[Tensor]:
    """Output, input gradient and parameter gradients of layers that `call` runs."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)
    y = x
    for layer in stack:
        y = call(layer, y, 0.5)
    torch.randn(())  # the generator has moved on when backward runs
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for layer in stack for p in layer.parameters())]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def with_saved(**options: Any) -> Call:
    saved = SavedInputs(**options)
    return lambda layer, *args: checkpoint(layer, *args, saved=saved)


WAYS: dict[str, Call] = {
    "checkpoint": checkpoint,
    "of the package": checkpointing.checkpoint,
    "offloaded": with_saved(offload=True),
    "one buffer": with_saved(slots=3),
    "several buffers": with_saved(slots=2),
    "offloaded, buffers": with_saved(offload=True, slots=2),
    "one rank": with_saved(partition=Topology.single().group("tp")),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_as_without(way: str) -> None:
    stack = layers()
    found = outcome(WAYS[way], stack)
    assert {layer.calls for layer in stack} == {2}
    assert same(found, outcome(plain, layers()))


def test_nested() -> None:
    def all_of_them(x: Tensor, stack: list[Layer]) -> Tensor:
        for layer in stack:
            x = checkpoint(layer, x, 0.5)
        return x

    def both(stack: list[Layer], x: Tensor, _: float) -> Tensor:
        return checkpoint(all_of_them, x, stack)

    class Stack(list):  # what `outcome` takes for one layer
        def parameters(self) -> Any:
            return [p for layer in self for p in layer.parameters()]

    stack = layers()
    found = outcome(both, [Stack(stack)])
    assert [layer.calls for layer in stack] == [3, 3, 2]  # forward, for the next one's input, for its own backward
    assert same(found, outcome(plain, layers()))


def test_without_torchs_generators_restored_dropout_would_differ() -> None:
    forgetful = outcome(lambda layer, *args: checkpoint(layer, *args, preserve_rng_state=False), layers())
    assert not same(forgetful, outcome(plain, layers()))


def check_partition(slots: int) -> None:
    """Also of a size that the ranks do not divide: 40 elements over 3 ranks."""
    topology = Topology.build(tp=torch.distributed.get_world_size())
    group = topology.group("tp")
    saved = SavedInputs(partition=group, slots=slots)
    before = topology.traffic.totals()
    for _ in range(2):
        assert same(
            outcome(lambda layer, *args: checkpoint(layer, *args, saved=saved), layers()), outcome(plain, layers())
        )
    spent = topology.traffic.since(before)
    assert spent["tp", "all-gather"].calls == 2 * 3  # one for each input, in backward
    share = (group.size - 1) / group.size
    assert spent["tp", "all-gather"].bytes == pytest.approx(2 * 3 * ROWS * WIDTH * 4 * share)
    x = torch.randn(ROWS, WIDTH)
    kept = saved.keep(x)
    assert kept.place.numel() == -(-ROWS * WIDTH // group.size)
    assert kept.place.untyped_storage().nbytes() == max(slots, 1) * kept.place.numel() * 4


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("slots", [0, 2])
def test_partition_gives_the_same_bits(ranks: Any, tp: int, slots: int) -> None:
    ranks.run(check_partition, tp, slots)


def check_what_is_partitioned() -> None:
    """Every rank holds other elements, and gets all of them back in order."""
    group = Topology.build(tp=torch.distributed.get_world_size()).group("tp")
    saved = SavedInputs(partition=group)
    x = torch.arange(9.0).view(3, 3).t()  # not contiguous
    kept = saved.keep(x)
    assert kept.place.tolist() == ([0, 3, 6, 1, 4], [7, 2, 5, 8, 0])[group.rank]
    assert torch.equal(saved.restore(kept), x)
    few, numbers, weight = torch.ones(1), torch.arange(4), nn.Parameter(torch.ones(4))
    for stays in (few, numbers, weight):
        assert saved.keep(stays) is stays and saved.restore(stays) is stays


def test_parts_come_back_in_order(ranks: Any) -> None:
    ranks.run(check_what_is_partitioned, 2)


def kept_by(call: Call, number: int) -> int:
    stack = layers(number)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def run() -> Tensor:
        y = x
        for layer in stack:
            y = call(layer, y)
        return y

    return live_bytes(run)


def test_only_inputs_are_kept() -> None:
    """What one more layer keeps: its input, where all activations are 10 times as much."""
    size = ROWS * WIDTH * 4
    assert kept_by(checkpoint, 4) - kept_by(checkpoint, 3) == size
    assert kept_by(plain, 4) - kept_by(plain, 3) == 10 * size
    buffered = with_saved(slots=2)
    assert kept_by(buffered, 4) == 2 * 2 * size + size  # two buffers of two, and the output


def test_slots_are_reused_and_given_back() -> None:
    saved = SavedInputs(slots=2)
    x = torch.ones(4)
    first, second = saved.keep(x), saved.keep(x)
    assert first.place.untyped_storage().data_ptr() == second.place.untyped_storage().data_ptr()
    third = saved.keep(x)  # a third at a time: a second buffer
    assert third.place.untyped_storage().data_ptr() != first.place.untyped_storage().data_ptr()
    assert saved.keep(torch.ones(5)).place.untyped_storage().data_ptr() != third.place.untyped_storage().data_ptr()
    places = {kept.place.data_ptr() for kept in (first, second, third)}
    del first, second, third
    again = [saved.keep(x) for _ in range(3)]
    assert {kept.place.data_ptr() for kept in again} <= places | {again[0].place.data_ptr() + 16}
    assert len({kept.place.untyped_storage().data_ptr() for kept in again}) == 2


def test_a_graph_without_backward_gives_its_slots_back() -> None:
    saved = SavedInputs(slots=1)
    ways = lambda layer, x: checkpoint(layer, x, saved=saved)  # noqa: E731
    x, stack = torch.randn(ROWS, WIDTH, requires_grad=True), layers(1)
    used = live_bytes(lambda: ways(stack[0], x))
    for _ in range(3):
        ways(stack[0], x)
    assert live_bytes(lambda: ways(stack[0], x)) == used - ROWS * WIDTH * 4  # the buffer was there


def test_backward_twice_over_one_graph() -> None:
    for way in (checkpoint, with_saved(slots=2)):
        stack = layers(1)
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        loss = way(stack[0], x).sum()
        (once,) = torch.autograd.grad(loss, x, retain_graph=True)
        (twice,) = torch.autograd.grad(loss, x)
        assert torch.equal(once, twice)


def test_nothing_is_kept_without_gradients() -> None:
    saved = SavedInputs(slots=2)
    with torch.no_grad():
        y = checkpoint(layers(1)[0], torch.randn(ROWS, WIDTH), saved=saved)
    assert not y.requires_grad and not saved._free


def test_an_exception_leaves_nothing_behind() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("in the function")

    saved = SavedInputs(slots=2)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with pytest.raises(ValueError, match="in the function"):
        checkpoint(fails, x, saved=saved)
    assert len(saved._free[x.numel(), x.dtype, x.device]) == 2
    (x * x).sum().backward()  # saved as usual: no hook is left
    assert torch.equal(x.grad, 2 * x.detach())


def test_a_function_that_changes_its_mind_is_an_error() -> None:
    widths = iter([WIDTH, WIDTH + 1])

    def other(x: Tensor) -> Tensor:
        return (x.sum() * torch.ones(next(widths), requires_grad=True)).exp()

    y = checkpoint(other, torch.randn(ROWS, WIDTH, requires_grad=True))
    with pytest.raises(CheckpointError, match="different metadata"):
        y.sum().backward()


class Reader(nn.Module):
    """Three projections of one normalized input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.normed = nn.LayerNorm(WIDTH), 0
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def inner(self, x: Tensor) -> Tensor:
        self.normed += 1
        return self.norm(x)

    def outer(self, x: Tensor, scale: float) -> Tensor:
        y = x.view(1, ROWS, WIDTH)[:, 1:]  # a view, with an offset
        return self.q(x).sin().sum() + self.k(y).exp().sum() * scale + (self.v(x) * x).sum()


def test_what_goes_between_is_computed_again_once() -> None:
    results, kept = [], []
    for way in (lambda inner, outer, x, *args: outer(inner(x), *args), without_keeping):
        reader = Reader()
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = way(reader.inner, reader.outer, x, 0.5)
        assert reader.normed == 1
        loss.backward(retain_graph=True)
        assert reader.normed == (1 if not results else 2)  # once for all who read it
        loss.backward()
        results.append([loss, x.grad, *(p.grad for p in reader.parameters())])
        kept.append(live_bytes(lambda reader=reader, x=x, way=way: way(reader.inner, reader.outer, x, 0.5)))
    assert same(*results)
    assert kept[0] - kept[1] == ROWS * WIDTH * 4


def test_what_was_restored_outlives_its_slot() -> None:
    saved, x = SavedInputs(slots=1), torch.ones(4)
    kept = saved.keep(x)
    restored = saved.restore(kept)
    del kept
    saved.keep(torch.zeros(4))  # the same slot
    assert torch.equal(restored, x)


def configured(**recompute: Any) -> RunConfig:
    settings = {f"recompute__recompute_{name}": value for name, value in recompute.items()}
    return derive(config_with(model__num_layers=10, **settings), 1)


def test_nothing_is_recomputed_by_default() -> None:
    assert Recompute.of(configured(), Topology.single()) == KEEP_ALL
    assert KEEP_ALL.part("mlp", lambda x: x, 3) == 3


@pytest.mark.parametrize(
    ("settings", "slots"),
    [({}, 10), ({"num_layers": 3}, 4), ({"method": "block", "num_layers": 3}, 3)],
)
def test_of_a_configuration(settings: dict[str, Any], slots: int) -> None:
    """One slot for each input that a micro-batch leaves on this rank."""
    config = configured(granularity="full", **settings)
    without = Recompute.of(config, Topology.single())
    assert (without.granularity, without.method) == ("full", settings.get("method", "uniform"))
    assert without.num_layers == settings.get("num_layers", 1)
    x = torch.ones(4)
    assert without.saved is not None and without.saved.keep(x) is x
    section = replace(config.recompute, contiguous_memory_optimization=True)
    buffered = Recompute.of(replace(config, recompute=section), Topology.single()).saved
    assert buffered is not None and (buffered.slots, buffered.offload, buffered.group) == (slots, False, None)


def test_all_options_of_a_configuration() -> None:
    section = {"partition_activations": True, "cpu_checkpointing": True, "contiguous_memory_optimization": True}
    config = configured(granularity="full")
    config = replace(config, recompute=replace(config.recompute, **section))
    topology = Topology.fake(8, pp=4, tp=2)
    try:
        saved = Recompute.of(config, topology).saved
        assert saved is not None and saved.group == topology.group("tp")
        assert saved.offload and saved.slots == 3  # ten layers over four stages
    finally:
        torch.distributed.destroy_process_group()
