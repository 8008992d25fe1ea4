"""Stages 2 and 3 on foreign modules: whatever a module does with its parameters, gradients and weights are those of
plain autograd on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megazero.parallel.collectives import Pending
from megazero.parallel.topology import Topology
from megazero.zero import zero as zero_module
from megazero.zero.gather import Limits
from megazero.zero.zero import Zero

CPU = torch.device("cpu")
WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 32, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Tied(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class SharedBlock(Blocks):
    """One block twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = self.blocks[0]


class CalledTwice(Blocks):
    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(self.norm(x))


@dataclass
class Output:
    logits: Tensor
    extra: dict[str, Any]


class RichOutputs(Blocks):
    """Modules that return and take what is not a tensor."""

    def forward(self, ids: Tensor) -> Any:
        return Output(super().forward(ids), {"name": "x", "none": None})


class Frozen(Blocks):
    """The first block and the embedding do not train, nor one weight inside another block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.requires_grad_(False)
        self.blocks[0].requires_grad_(False)
        self.blocks[1].up.weight.requires_grad_(False)


class Unused(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(WIDTH, 64)
        self.blocks[1].never = nn.Linear(WIDTH, WIDTH)


class Outside(Blocks):
    """Reads parameters of modules that it does not call, and of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5))

    def forward(self, ids: Tensor) -> Any:
        x = nn.functional.embedding(ids, self.embed.weight) * self.scale
        first = self.blocks[0].up.weight
        for block in self.blocks:
            x = block(x)
        x = x + nn.functional.linear(nn.functional.linear(x, first), self.blocks[1].down.weight) * self.scale
        return nn.functional.linear(self.norm(x), self.head.weight)


class Checkpointed(Blocks):
    reentrant = False

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        x.requires_grad_() if not x.requires_grad else None
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Nested(nn.Module):
    """A unit inside a unit, and attention that reads a child's weights without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(2))
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.outer = nn.Sequential(
            nn.Linear(WIDTH, 64), Block.__new__(Block) if False else nn.Tanh(), nn.Linear(64, 32)
        )

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for pair in self.blocks:
            for block in pair:
                x = block(x)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.outer(x)


class Square(torch.autograd.Function):
    """A custom function that saves a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] * weight * weight, (2 * grads[0] * x * weight).sum(dim=(0, 1))


class Custom(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = Square.apply(block(x), self.square)
        return self.head(self.norm(x))


class EvalBetween(Blocks):
    """Evaluates in the middle of its training forward."""

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        with torch.no_grad():
            for block in self.blocks:
                block(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


MODELS = [
    Blocks, Tied, SharedBlock, CalledTwice, RichOutputs, Frozen, Unused, Outside, Checkpointed, CheckpointedReentrant,
    Nested, Custom, EvalBetween,
]  # fmt: skip
UNITS = {
    Nested: ["blocks.0", "blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1", "attend"],
}


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return kind()


def loss_of(model: nn.Module, rank: int, micro: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    ids = torch.randint(0, 32, (2, 6), generator=generator)
    target = torch.randint(0, 32, (2, 6), generator=generator)
    logits = model(ids)
    logits = logits.logits if isinstance(logits, Output) else logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def plain_steps(kind: Any, ranks: int, micros: int, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Stochastic gradient descent in one process."""
    model = make(kind)
    losses = []
    for step in range(steps):
        model.zero_grad()
        total = sum(loss_of(model, rank, micro, step) for rank in range(ranks) for micro in range(micros))
        assert isinstance(total, Tensor)
        total.backward()
        losses.append(float(total))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def zero_steps(
    kind: Any, stage: int, micros: int, steps: int, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    topology = Topology.build()
    model = make(kind)
    names = [name for name, m in model.named_modules() if isinstance(m, Block)]
    zero = Zero(
        model,
        topology,
        stage=stage,
        dtype=torch.float32,
        device=CPU,
        initial=lambda place: torch.zeros(0),
        units=UNITS.get(kind, names),
        **settings,
    )
    losses = []
    for step in range(steps):
        total = 0.0
        for micro in range(micros):
            zero.sync = micro == micros - 1
            loss = loss_of(model, topology.rank, micro, step)
            loss.backward()
            zero.end_backward()
            total += float(loss.detach())
            with torch.no_grad():  # an evaluation in between changes nothing
                loss_of(model, 0, 0, 99)
        zero.finish_reduction()
        losses.append(total)
        with torch.no_grad():
            for bucket in zero.buckets:
                bucket.master -= 0.05 * bucket.reduced
        zero.publish()
    if zero.gatherer is not None:
        assert not zero.gatherer._live and not zero.gatherer._coming and not zero.gatherer._pinned
        for bucket in zero.gatherer.buckets:
            for place in bucket.placed:
                assert place.parameter.shape == place.spec.local_shape
                assert place.parameter.isnan().all(), "a sharded parameter shows NaN"
        zero.gatherer.hold(range(len(zero.gatherer.buckets)))
    zero.wait_parameters()
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def check_model(kind: Any, stage: int, settings: dict[str, Any]) -> None:
    group = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    micros = 2
    got, weights = zero_steps(kind, stage, micros, 3, **settings)
    wanted, reference = plain_steps(kind, group, micros, 3)
    totals = torch.tensor(got)
    if group > 1:
        torch.distributed.all_reduce(totals)
    torch.testing.assert_close(totals, torch.tensor(wanted), rtol=2e-6, atol=0)
    assert weights.keys() == reference.keys()
    for name in reference:
        torch.testing.assert_close(
            weights[name], reference[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_any_module(ranks: Any, kind: Any, stage: int) -> None:
    ranks.run(check_model, 2, kind, stage, {"bucket_elements": 1500})


SETTINGS = {
    "nothing ahead": {"limits": Limits(prefetch=0)},
    "much ahead": {"limits": Limits(prefetch=10**9)},
    "few live": {"limits": Limits(prefetch=10**9, live=1)},
    "nothing beside what is used": {"limits": Limits(prefetch=10**9, live=0, reuse=10**9)},
    "kept for backward": {"limits": Limits(reuse=10**9)},
    "last unit kept": {"limits": Limits(reuse=7000)},
    "small ones whole": {"persistence_threshold": 200},
    "no overlap": {"overlap_reduce": False, "overlap_gather": False},
    "one bucket a unit": {"bucket_elements": None},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_stage_3_change_no_number(ranks: Any, name: str) -> None:
    for kind in (Blocks, Outside, CalledTwice, Checkpointed):
        ranks.run(check_model, 2, kind, 3, {"bucket_elements": 1500} | SETTINGS[name])


def check_what_is_whole(reuse: int, wanted: list[str]) -> None:
    """Between forward and backward."""
    model = make(Blocks)
    zero = Zero(
        model,
        Topology.build(),
        stage=3,
        dtype=torch.float32,
        device=CPU,
        initial=lambda place: torch.zeros(0),
        units=[f"blocks.{i}" for i in range(3)],
        limits=Limits(reuse=reuse),
        persistence_threshold=17,
    )
    loss = loss_of(model, 0, 0, 0)
    assert zero.gatherer is not None
    assert sorted({zero.gatherer.buckets[index].unit for index in zero.gatherer._live}) == wanted
    assert not model.norm.weight.isnan().any(), "smaller than the threshold"
    during: list[set[str]] = []
    gatherer = zero.gatherer
    model.blocks[1].norm.weight.register_post_accumulate_grad_hook(
        lambda _: during.append({gatherer.buckets[index].unit for index in gatherer._live})
    )
    loss.backward()
    assert len(during) == 1 and "blocks.2" not in during[0], "what backward is through with is let go"
    zero.end_backward()
    assert not zero.gatherer._live


def test_what_stays_whole_between_forward_and_backward(ranks: Any) -> None:
    ranks.run(check_what_is_whole, 2, 0, [])
    ranks.run(check_what_is_whole, 2, 7000, ["", "blocks.2"])
    ranks.run(check_what_is_whole, 2, 10**9, ["", "blocks.0", "blocks.1", "blocks.2"])


def check_late_gathers(stage: int) -> None:
    """Gathers that complete only when waited for, under a model that reads weights of modules that it never calls."""
    real = zero_module.all_gather_slices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_module, "all_gather_slices", lambda *given: Pending([], lambda: real(*given).wait()))
        for settings in ({"bucket_elements": 1}, {"bucket_elements": 1500}):
            check_model(Outside, stage, settings | ({"persistence_threshold": 200} if stage == 3 else {}))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_read_from_outside_have_arrived(ranks: Any, stage: int) -> None:
    ranks.run(check_late_gathers, 2, stage)
