"""Zero on foreign modules over 1 and 2 ranks: which gradients arrive, what is sharded, when parameters are whole."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.parallel.collectives import Pending, all_reduce, gather_objects
from megazero.parallel.sharding import ShardSpec, split
from megazero.parallel.topology import Topology
from megazero.zero import zero as zero_module
from megazero.zero.zero import Zero

CPU = torch.device("cpu")


class Block(nn.Module):
    """Reads out_proj's parameters without calling it, as nn.MultiheadAttention does, and has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("calls", torch.zeros(2, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.attend(*[self.norm(x)] * 3, need_weights=False)[0]


class Foreign(nn.Module):
    """An ordinary torch module: tied embedding and head, a parameter of its own, one that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.side = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, side: bool) -> Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        if side:
            x = x + self.side(x)
        return self.head(x)


def build(**settings: Any) -> tuple[Foreign, Zero]:
    torch.manual_seed(3)
    model = Foreign()
    defaults = {
        "stage": 1,
        "dtype": torch.float32,
        "device": CPU,
        "units": ["blocks.0", "blocks.1"],
        "bucket_elements": 150,
    }
    return model, Zero(model, Topology.build(), initial=never, **(defaults | settings))


def never(place: Any) -> Tensor:
    raise AssertionError(f"{place.name} has values of its own")


def loss_of(model: nn.Module, rank: int, micro: int, step: int = 0, side: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    ids = torch.randint(0, 12, (2, 5), generator=generator)
    target = torch.randn(2, 5, 12, generator=generator)
    return (model(ids, side) * target).sum()


def backward_all(model: nn.Module, zero: Zero, micros: int = 3, step: int = 0, side: Any = lambda micro: True) -> None:
    rank = zero.group.rank
    for micro in range(micros):
        zero.sync = micro == micros - 1
        loss_of(model, rank, micro, step, side(micro)).backward()
    zero.finish_reduction()


def reference_gradients(
    model: nn.Module, ranks: int, micros: int = 3, side: Any = lambda micro: True
) -> dict[str, Tensor]:
    """Plain autograd over all ranks' micro-batches on a copy of the model."""
    torch.manual_seed(3)
    plain = Foreign()
    for rank in range(ranks):
        for micro in range(micros):
            loss_of(plain, rank, micro, 0, side(micro)).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in plain.named_parameters()}


def assembled(zero: Zero, buffers: Any) -> dict[str, Tensor]:
    """Logical tensors from every rank's pieces for saving; each element must come from exactly one rank."""
    mine = [(name, shape, box, t.float().clone()) for name, shape, box, t in zero.pieces(buffers, for_save=True)]
    wholes: dict[str, Tensor] = {}
    for name, shape, box, part in chain(*gather_objects(mine, zero.topology.group("world"))):
        target = box.of(wholes.setdefault(name, torch.full(shape, torch.nan)))
        assert target.isnan().all(), f"{name} {box} came twice"
        target.copy_(part)
    assert not any(t.isnan().any() for t in wholes.values()), "an element is on no rank"
    return wholes


def gradients(zero: Zero) -> dict[str, Tensor]:
    return assembled(zero, [(b, b.owned[0], b.reduced) for b in zero.buckets])


def descend(zero: Zero, rate: float = 0.01) -> None:
    for bucket in zero.buckets:
        bucket.master -= rate * bucket.reduced
    zero.publish()


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=tolerance, atol=tolerance * 10)


def check_gradients() -> None:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    wanted = reference_gradients(Foreign(), ranks)
    squares = sum(float(g.double().square().sum()) for g in wanted.values())
    for settings in [{}, {"stage": 0}, {"overlap_reduce": False}, {"bucket_elements": None}, {"units": []}]:
        model, zero = build(**settings)
        backward_all(model, zero)
        close(gradients(zero), wanted)
        assert all(p.grad is None for p in model.parameters())
        norm = all_reduce(zero.norm_squared(), zero.group)
        assert float(norm) == pytest.approx(squares, rel=1e-5)
        backward_all(model, zero)  # the next step starts from nothing
        close(gradients(zero), wanted)
        zero.scale_gradients(0.5)
        close(gradients(zero), {name: g / 2 for name, g in wanted.items()})
    model, zero = build(wire_dtype=torch.bfloat16)
    backward_all(model, zero)
    close(gradients(zero), wanted, 0.02)


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_are_sums_over_ranks_and_micro_batches(ranks: Any, size: int) -> None:
    ranks.run(check_gradients, size)


def check_unused() -> None:
    for overlap in (True, False):
        model, zero = build(overlap_reduce=overlap)
        backward_all(model, zero)  # leaves gradients behind
        backward_all(model, zero, side=lambda micro: False)
        found = gradients(zero)
        assert not found["side.weight"].any() and not found["side.bias"].any()
        close(found, reference_gradients(model, 2, side=lambda micro: False))
        only_first = lambda micro: micro == 0  # noqa: E731  used, but not at the boundary
        backward_all(model, zero, side=only_first)
        close(gradients(zero), reference_gradients(model, 2, side=only_first))
        on_rank_1 = zero.group.rank == 1  # ranks need not agree on what is used
        backward_all(model, zero, side=lambda micro, used=on_rank_1: used)
        found = gradients(zero)
        torch.manual_seed(3)
        plain = Foreign()
        for rank in range(2):
            for micro in range(3):
                loss_of(plain, rank, micro, 0, side=rank == 1).backward()
        close(found, {name: p.grad for name, p in plain.named_parameters()})


def test_unused_parameters_have_zero_gradient(ranks: Any) -> None:
    ranks.run(check_unused, 2)


def check_explicit() -> None:
    """A schedule that assigns `.grad` itself, firing no hook, says so; the result is the hooks'."""
    model, zero = build()
    rank = zero.group.rank
    for micro in range(2):
        zero.sync = micro == 1
        parameters = list(model.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss_of(model, rank, micro), parameters), strict=True
        ):
            parameter.grad = gradient
            zero.gradient_ready(parameter)
            assert parameter.grad is None
    zero.finish_reduction()
    close(gradients(zero), reference_gradients(model, 2, micros=2))


def test_explicit_gradients(ranks: Any) -> None:
    ranks.run(check_explicit, 2)


def train(steps: int = 3, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights as the model has them on this rank, and the masters."""
    model, zero = build(**settings)
    for step in range(steps):
        backward_all(model, zero, step=step, side=lambda micro, step=step: step != 1)
        descend(zero)
    zero.wait_parameters()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, assembled(zero, zero.masters())


def check_settings_agree() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights, masters = train(dtype=dtype)
        for settings in [
            {"stage": 0},
            {"overlap_reduce": False},
            {"overlap_gather": False},
            {"stage": 0, "overlap_reduce": False, "overlap_gather": False},
        ]:
            other_weights, other_masters = train(dtype=dtype, **settings)
            assert all(torch.equal(weights[name], other_weights[name]) for name in weights), settings
            assert all(torch.equal(masters[name], other_masters[name]) for name in masters), settings
        everywhere = gather_objects(weights, Topology.build().group("world"))
        assert all(torch.equal(everywhere[0][name], everywhere[1][name]) for name in weights)
        for name, weight in weights.items():
            assert weight.dtype == dtype and torch.equal(weight, masters[name].to(dtype))
    start = dict(build()[0].named_parameters())
    assert all(not torch.equal(start[name], masters[name]) for name in masters)


def test_stages_and_overlap_agree_bitwise(ranks: Any) -> None:
    ranks.run(check_settings_agree, 2)


def check_waits() -> None:
    """Gathers that complete only when waited for: whoever reads a parameter too early reads an old one."""
    real = zero_module.all_gather_slices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_module, "all_gather_slices", lambda *given: Pending([], lambda: real(*given).wait()))
        for units in (["blocks.0", "blocks.1"], []):
            model, zero = build(bucket_elements=1, units=units)
            backward_all(model, zero)
            descend(zero)
            with torch.no_grad():
                got = loss_of(model, 0, 0, side=False)
            left = {name for i in zero._gathers for name in [zero.buckets[i].placed[0].name]}
            assert left == ({"side.weight", "side.bias"} if units else set())
            zero.wait_parameters()
            assert torch.equal(loss_of(model, 0, 0, side=False), got)
            descend(zero)
            listed = [parameter.detach().clone() for parameter in model.parameters()]
            zero.wait_parameters()
            assert all(torch.equal(then, now) for then, now in zip(listed, model.parameters(), strict=True))
            descend(zero)
            backward_all(model, zero, side=lambda micro: False)
            assert not zero._gathers  # unused ones too, before the optimizer changes what is being sent
    assert zero_module.all_gather_slices is real


def test_parameters_have_arrived_when_they_are_used(ranks: Any) -> None:
    ranks.run(check_waits, 2)


def test_buffers_are_untouched_and_ties_hold() -> None:
    model, zero = build(dtype=torch.bfloat16)
    assert model.head.weight is model.embed.weight
    assert sorted(name for name, _ in model.named_buffers()) == ["blocks.0.calls", "blocks.1.calls"]
    backward_all(model, zero)
    descend(zero)
    assert model.blocks[0].calls.tolist() == [3, 3]
    assert model.head.weight is model.embed.weight and model.head.weight.dtype == torch.bfloat16
    names = [place.name for bucket in zero.buckets for place in bucket.placed]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    saved = {name for name, *_ in zero.pieces(zero.masters(), for_save=True)}
    assert saved == set(names)


def test_foreign_parameters_on_meta_are_known_by_their_full_names() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    initial = lambda place: torch.full(place.spec.local_shape, float(len(place.spec.name)))  # noqa: E731
    zero = Zero(model, Topology.single(), stage=1, dtype=torch.float32, device=CPU, initial=initial, units=[])
    names = [place.spec.name for bucket in zero.buckets for place in bucket.placed]
    assert names == ["1.bias", "1.weight", "0.bias", "0.weight"]
    assert model[0].weight.tolist() == [[8.0, 8.0]] * 3 and model[1].bias.tolist() == [6.0, 6.0]


def test_real_parameters_keep_their_values_before_the_cast() -> None:
    torch.manual_seed(3)
    plain = Foreign()
    model, zero = build(dtype=torch.bfloat16)
    masters = assembled(zero, zero.masters())
    for (name, parameter), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(masters[name], before) and torch.equal(parameter, before.bfloat16())
    assert any(not torch.equal(masters[name], p.float()) for name, p in model.named_parameters())


class Sharded(nn.Module):
    """Specs as tensor parallelism makes them: split rows, split columns, replicated, copied in pairs."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        tp = topology.group("tp")
        own = (tp.ranks[tp.rank],)
        for name, shape, box, replicas in [
            ("rows", (6, 5), split(0, (6, 5), tp.rank, tp.size), own),
            ("columns", (5, 8), split(1, (5, 8), tp.rank, tp.size), own),
            ("copied", (7,), split(0, (7,), 0, 1), tp.ranks),
        ]:
            parameter = nn.Parameter(torch.empty(box.shape, device="meta"))
            parameter.shard_spec = ShardSpec(f"logical.{name}", shape, (box,), replicas=replicas)
            self.register_parameter(name, parameter)


def logical(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


def check_pieces() -> None:
    topology = Topology.build(tp=2)
    for stage in (0, 1):
        model = Sharded(topology)
        zero = Zero(
            model,
            topology,
            stage=stage,
            dtype=torch.bfloat16,
            device=CPU,
            initial=lambda place: place.spec.local(logical(place.spec.name, place.spec.shape)),
            units=[],
        )
        found = assembled(zero, zero.masters())
        assert {name: tuple(t.shape) for name, t in found.items()} == {
            "logical.rows": (6, 5),
            "logical.columns": (5, 8),
            "logical.copied": (7,),
        }
        for name, tensor in found.items():
            assert torch.equal(tensor, logical(name, tuple(tensor.shape)))
        loaded = zero.pieces(zero.masters(), for_save=False, suffix=".x")
        elements = sum(box.numel for _, _, box, _ in loaded)
        assert elements == sum(hi - lo for b in zero.buckets for _, lo, hi in b.parts(*b.owned))
        for _, _, box, view in loaded:
            assert view.shape == box.shape
            view.fill_(7.0)  # views: filling them is loading
        assert {name for name, *_ in loaded} <= {f"{name}.x" for name in found}
        zero.publish()
        zero.wait_parameters()
        assert all((p == 7.0).all() for p in model.parameters())
        for bucket in zero.buckets:
            bucket.grads.fill_(1.0)
        counted = all_reduce(zero.norm_squared(), topology.group("world"))
        assert float(counted) == pytest.approx(30 + 40 + 7)  # each logical element once


def test_pieces_tile_the_logical_tensors(ranks: Any) -> None:
    ranks.run(check_pieces, 4)


def test_segments_cut_where_the_key_changes() -> None:
    _, zero = build(units=[], bucket_elements=None)
    (bucket,) = zero.buckets
    cuts = zero.segments(lambda place: len(place.spec.shape) > 1)
    assert cuts[0][2] == 0 and cuts[-1][3] == bucket.numel
    assert all(one[3] == two[2] and one[1] != two[1] for one, two in pairwise(cuts))
    for place in bucket.placed:
        assert [key for _, key, lo, hi in cuts if lo <= place.start and place.stop <= hi] == [place.parameter.dim() > 1]
