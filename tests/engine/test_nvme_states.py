"""Optimizers whose masters or states are files: steps and resumed steps are those of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.fronts import assert_like, batch_of, config_of, engine_of, make, masters_of, train

LR = 1e-2


def check_resumed(
    folder: Path, name: str, arguments: dict[str, Any], zero: dict[str, Any], precision: str = "fp32"
) -> None:
    """Three steps, a checkpoint, two more on the same engine and on a new one."""
    named = {"type": name, "params": {"lr": LR, **arguments}}
    settings = config_of(precision=precision, zero_optimization=zero, optimizer=named)
    model = make()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=LR, **arguments)
    for step in range(5):
        optimizer.zero_grad()
        model(*batch_of(step)).backward()
        optimizer.step()
    engine = engine_of(config=settings)
    train(engine, 3)
    engine.save_checkpoint(folder / "saved")
    train(engine, 2, first=3)
    assert_like(engine, model, 2e-5 if precision == "fp32" else 2e-2)
    other = engine_of(config=settings)
    other.load_checkpoint(folder / "saved")
    train(other, 2, first=3)
    found, wanted = masters_of(other), masters_of(engine)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def zero_with(folder: Path, stage: int, *parts: str) -> dict[str, Any]:
    """`parts` of the state in files, all of them."""
    home: dict[str, Any] = {"device": "nvme", "nvme_path": str(folder)}
    return {"stage": stage} | {part: home | ({"max_in_cpu": 0} if part == "offload_param" else {}) for part in parts}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_that_an_optimizer_is_made_with(ranks: Any, tmp_path: Path, precision: str) -> None:
    """torch's Adagrad makes its sums in its constructor, when the masters are in files already."""
    zero = zero_with(tmp_path, 3, "offload_optimizer", "offload_param") | {"reduce_bucket_size": 100}
    ranks.run(check_resumed, 2, tmp_path, "Adagrad", {"initial_accumulator_value": 0.1}, zero, precision)


@pytest.mark.parametrize("size", [1, 2])
def test_fp32_masters_in_files_and_states_in_memory(ranks: Any, tmp_path: Path, size: int) -> None:
    """fp32 weights are their own masters, so that these go to the disk with the weights alone."""
    ranks.run(check_resumed, size, tmp_path, "AdamW", {}, zero_with(tmp_path, 3, "offload_param"))


class Counting(torch.optim.Optimizer):
    """SGD whose learning rate falls with a count that it keeps itself, beside groups and states."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": LR})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"] / self.count)


def check_counting(folder: Path) -> None:
    model = make()
    optimizer = Counting(model.parameters())
    zero = zero_with(folder, 3, "offload_optimizer", "offload_param") | {"reduce_bucket_size": 100}
    engine = engine_of(config=config_of(zero_optimization=zero), optimizer=Counting)
    for step in range(4):
        optimizer.zero_grad()
        model(*batch_of(step)).backward()
        optimizer.step()
    train(engine, 4)
    assert engine.shards is not None
    assert engine.shards.optimizer.count == 4  # type: ignore[attr-defined]
    assert_like(engine, model, 1e-6)


def test_an_optimizer_that_counts_its_steps(ranks: Any, tmp_path: Path) -> None:
    """A step over files is one, though it goes bucket by bucket."""
    ranks.run(check_counting, 2, tmp_path)
