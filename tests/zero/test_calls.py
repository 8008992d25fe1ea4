"""Forwards of another shape than one call of the whole module: parts by themselves, generators, other people's
saved-tensor hooks, an engine inside an engine's module. Losses and weights are those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import megazero
from tests.zero.test_stages import WIDTH, Blocks, make

Loss = Callable[[Any, Tensor], Tensor]


def settings_of(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def ids_of(rank: int, step: int) -> Tensor:
    return torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(10 * step + rank))


def module_of(model: Any) -> Any:
    return model if isinstance(model, nn.Module) else model.module


class Autoencoder(nn.Module):
    """Two parts that are models themselves, with norms too small for buckets of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Blocks(2), nn.Sequential(nn.LayerNorm(32), nn.Linear(32, WIDTH))

    def forward(self, ids: Tensor) -> Any:
        return self.decoder(self.encoder(ids))


def loss_of_parts(model: Any, ids: Tensor) -> Tensor:
    part = module_of(model)
    logits = part.encoder(ids)
    return part.decoder(logits).square().mean() + part.decoder[0](logits).abs().mean()


class Stepwise(Blocks):
    """Gives a result after each block, while the caller asks for them."""

    def forward(self, ids: Tensor) -> Iterator[Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
            yield self.head(self.norm(x))


def loss_of_steps(model: Any, ids: Tensor) -> Tensor:
    total: Tensor = sum(y.square().mean() for y in model(ids))  # type: ignore[assignment]
    return total


class Outer(nn.Module):
    """Calls a model that is not its child, and may be another engine."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.own, self.other = Blocks(2), [inner]

    def forward(self, ids: Tensor) -> Any:
        return self.own(ids) * self.other[0](ids)


def check_engine_inside(stages: tuple[int, int]) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain, model = make(lambda: Outer(Blocks())), make(lambda: Outer(Blocks()))
    parameters = [*plain.parameters(), *plain.other[0].parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    inner, *_ = megazero.initialize(model=model.other[0], config=settings_of(stages[0]))
    model.other[0] = inner
    engine, *_ = megazero.initialize(model=model, config=settings_of(stages[1]))
    for step in range(3):
        optimizer.zero_grad()
        torch.stack([plain(ids_of(other, step)).square().mean() for other in range(ranks)]).mean().backward()
        optimizer.step()
        engine.backward(engine(ids_of(rank, step)).square().mean())
        engine.step()
        inner.step()
    for trained, wanted in ((engine.module, plain), (inner.module, plain.other[0])):
        weights = trained.state_dict()
        for key, value in wanted.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("stages", [(3, 3), (3, 1), (1, 3)], ids=str)
def test_an_engine_inside_anothers_module(ranks: Any, stages: tuple[int, int]) -> None:
    ranks.run(check_engine_inside, 2, stages)


class Tracker:
    """Keeps saved tensors itself, as activation offloaders do: parameters as they are, others elsewhere."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def pack(self, tensor: Tensor) -> int:
        self.kept.append(tensor if isinstance(tensor, nn.Parameter) else tensor.clone())
        return len(self.kept) - 1

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, lambda index: self.kept[index])


class Offloaded(Blocks):
    """Its blocks run under hooks of a user's."""

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                x = block(x)
        return self.head(self.norm(x))


def loss_under_hooks(model: Any, ids: Tensor) -> Tensor:
    with Tracker().hooks():
        loss: Tensor = model(ids).square().mean()
    return loss


CALLS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "parts": (Autoencoder, loss_of_parts),
    "generator": (Stepwise, loss_of_steps),
    "under hooks": (Blocks, loss_under_hooks),
    "blocks under hooks": (Offloaded, lambda model, ids: model(ids).square().mean()),
}


def check_calls(name: str, stage: int) -> None:
    kind, loss_of = CALLS[name]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain = make(kind)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    engine, *_ = megazero.initialize(model=make(kind), config=settings_of(stage))
    for step in range(3):
        losses = [loss_of(plain, ids_of(other, step)) for other in range(ranks)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        loss = loss_of(engine, ids_of(rank, step))
        torch.testing.assert_close(loss, losses[rank], rtol=1e-5, atol=1e-6)
        engine.backward(loss)
        engine.step()
        with torch.no_grad():
            torch.testing.assert_close(loss_of(engine, ids_of(0, 9)), loss_of(plain, ids_of(0, 9)))
    weights = engine.module.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    gatherer = engine.zero.gatherer
    assert gatherer is None or not (gatherer._live or gatherer._pinned or gatherer._coming)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_equals_one_process(ranks: Any, name: str, stage: int) -> None:
    ranks.run(check_calls, 2, name, stage)
