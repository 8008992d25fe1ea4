"""safe_get_full_grad and safe_set_full_grad between backwards: what was looked at is not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.engine.engine import Engine
from megazero.zero import safe_get_full_grad, safe_set_full_grad
from tests.engine.fronts import assert_like, batch_of, config_of, engine_of, make, parts_of

SGD: dict[str, Any] = {"optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}}
GAS = 4


class Half(nn.Module):
    """Uses its second layer in some micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.more = make(), nn.Linear(12, 1)

    def forward(self, x: Tensor, target: Tensor, both: bool) -> Tensor:
        loss: Tensor = self.inner(x, target)
        return loss + self.more(x).square().mean() if both else loss


def half() -> Half:
    torch.manual_seed(3)
    return Half()


def used(index: int) -> bool:
    return index == 0


def look(engine: Engine, model: nn.Module, precision: str, part: float) -> None:
    wanted = dict(model.named_parameters())
    for name, parameter in engine.module.named_parameters():
        found, grad = safe_get_full_grad(parameter), wanted[name].grad
        expected = torch.zeros_like(wanted[name]) if grad is None else grad * part
        bound = 2e-6 if precision == "fp32" else 2e-2
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound, msg=name)


def check_looks(stage: int, precision: str, looks: tuple[int, ...]) -> None:
    """Gradients are asked for after micro-batches `looks` of four, in three steps of SGD."""
    fp16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 8}} if precision == "fp16" else {}
    engine = engine_of(half(), config_of(stage, precision, gas=GAS, **SGD, **fp16))
    model = half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ranks = engine.topology.size("dp")
    for step in range(3):
        optimizer.zero_grad()
        for index, (x, target) in enumerate(parts_of(step, engine)):
            for rank in range(ranks):
                mine = [t.chunk(ranks)[rank].chunk(GAS)[index] for t in batch_of(step)]
                (model(*mine, used(index)) / (GAS * ranks)).backward()
            dtype = engine.precision.dtype
            engine.backward(engine(x.to(dtype), target.to(dtype), used(index)))
            if index in looks:
                look(engine, model, precision, 1.0)
            engine.step()
        optimizer.step()
    assert_like(engine, model, 2e-6 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_looking_changes_nothing(ranks: Any, stage: int) -> None:
    for looks in [(0,), (1, 2), (0, 1, 2, 3)]:
        ranks.run(check_looks, 2, stage, "fp32", looks)
    ranks.run(check_looks, 1, stage, "fp32", (0, 2))
    ranks.run(check_looks, 2, stage, "fp16", (1, 3))


def check_two_losses(stage: int) -> None:
    """Between two losses of one micro-batch, the first of which is doubled by hand."""
    engine = engine_of(config=config_of(stage, **SGD))
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        model(*batch_of(step)).backward()
        optimizer.step()
        loss = engine(*parts_of(step, engine)[0])
        engine.backward(loss * 0.25, retain_graph=True)
        for parameter in engine.module.parameters():
            grad = safe_get_full_grad(parameter)
            assert grad is not None
            safe_set_full_grad(parameter, grad * 2)
        (loss * 0.5).backward()  # without the engine's own backward()
        engine.step()
    assert_like(engine, model, 2e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_between_two_losses(ranks: Any, stage: int) -> None:
    ranks.run(check_two_losses, 2, stage)
