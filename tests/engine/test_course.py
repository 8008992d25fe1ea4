"""The learning-rate course that a RunConfig asks of initialize()."""

from __future__ import annotations

import pytest
import torch

import megazero
from megazero.config.schema import OptimizerConfig, RunConfig, TrainingConfig
from tests.engine.fronts import make, train


@pytest.mark.parametrize(
    "length", [{"train_iters": 6}, {"train_samples": 96}, {}], ids=["train_iters", "train_samples", "lr_decay_iters"]
)
def test_the_learning_rate_course_of_a_run_config(length: dict[str, int]) -> None:
    course = OptimizerConfig(
        lr=0.01, min_lr=0.001, lr_warmup_iters=2, lr_decay_style="linear", lr_decay_iters=None if length else 6
    )
    training = TrainingConfig(precision="fp32", micro_batch_size=16, global_batch_size=16, **length)  # type: ignore[arg-type]
    engine = megazero.initialize(model=make(), config=RunConfig(training=training, optimizer=course))[0]
    used = []
    for _ in range(8):
        used.append(engine.get_lr()[0])
        train(engine, 1)
    # W = 2, D = 6: 0, then half of the warmup, the peak, and down to min_lr in steps of (lr - min_lr) / 4
    assert used == pytest.approx([0, 0.005, 0.01, 0.00775, 0.0055, 0.00325, 0.001, 0.001])
    stated = megazero.initialize(model=make(), config=RunConfig(training=training), lr_scheduler=flat)[3]
    assert isinstance(stated, torch.optim.lr_scheduler.LambdaLR)


def flat(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
