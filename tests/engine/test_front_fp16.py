"""fp16 under initialize(): overflow, the scale's course, and what it is multiplied into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megazero.base.errors import NonFiniteError
from tests.engine.fronts import (
    LR,
    SAMPLES,
    Regressor,
    assert_like,
    batch_of,
    config_of,
    engine_of,
    masters_of,
    plain,
    train,
)


class Explosive(Regressor):
    """A loss that overflows on rank 1 where it is told to."""

    blow = False

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        loss = super().forward(x, target)
        return loss * torch.tensor(60000.0, dtype=loss.dtype) * 100 if self.blow else loss


def check_overflow(stage: int) -> None:
    settings = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}
    torch.manual_seed(7)
    engine = engine_of(Explosive(), config_of(stage, "fp16", fp16=settings, gradient_clipping=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(engine.optimizer.inner, 1, gamma=0.5)  # type: ignore[union-attr, arg-type]
    engine.lr_scheduler = scheduler
    trace = []
    for step in range(7):
        engine.module.blow = step == 2 and engine.topology.rank == 1
        before = masters_of(engine)
        train(engine, 1, first=step)
        same = all(torch.equal(weight, before[name]) for name, weight in masters_of(engine).items())
        assert engine.was_step_applied() == (not same)
        trace.append((engine.loss_scale, engine.overflow, engine.skipped_steps, engine.get_lr()[0] / LR))
    assert trace == [
        (256.0, False, 0, 0.5),
        (256.0, False, 0, 0.25),
        (128.0, True, 1, 0.25),
        (128.0, False, 1, 0.125),
        (128.0, False, 1, 0.0625),
        (256.0, False, 1, 0.03125),
        (256.0, False, 1, 0.015625),
    ]
    assert engine.global_steps == 7
    assert engine.optimizer is not None and not engine.optimizer.overflow
    assert engine.optimizer.cur_scale == engine.optimizer.loss_scale == engine.cur_scale == 256.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_overflow_skips_and_lowers_the_scale(ranks: Any, stage: int) -> None:
    ranks.run(check_overflow, 2, stage)


def check_warning() -> None:
    engine = engine_of(Explosive(), config_of(1, "fp16", fp16={"enabled": True, "initial_scale_power": 8}))
    engine.module.blow = engine.topology.rank == 1
    train(engine, 1)
    assert engine.last is not None and engine.last.warning is not None
    assert "rank 1: gradient of " in engine.last.warning and "rank 0" not in engine.last.warning
    assert "gradients overflowed at loss scale 256" in engine.last.warning


def test_overflow_names_rank_and_parameter(ranks: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ranks.run(check_warning, 2)


def test_overflow_at_the_smallest_scale() -> None:
    engine = engine_of(
        Explosive(), config_of(1, "fp16", fp16={"enabled": True, "initial_scale_power": 0, "hysteresis": 1})
    )
    engine.module.blow = True
    with pytest.raises(NonFiniteError, match=r"loss scale 1, the smallest allowed"):
        train(engine, 1)


def test_a_step_after_an_error_knows_nothing_of_it() -> None:
    """The losses of the step that failed are not counted in the next one."""
    settings = {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 4, "hysteresis": 1}
    torch.manual_seed(7)
    engine = engine_of(Explosive(), config_of(1, "fp16", gas=2, fp16=settings))
    engine.module.blow = True
    with pytest.raises(NonFiniteError, match=r"loss scale 4, the smallest allowed"):
        train(engine, 1)
    engine.module.blow = False
    train(engine, 1)
    assert engine.was_step_applied() and engine.last is not None
    assert engine.last.loss == pytest.approx(plain(1)[1][0], rel=1e-2)


def test_the_scale_of_the_backward_is_undone_when_it_grows() -> None:
    """At every growth DeepSpeed halves the gradient; here the norm tells that it stays the same."""
    settings = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1}
    engine = engine_of(config=config_of(1, "fp16", fp16=settings, optimizer={"type": "SGD", "params": {"lr": 0.0}}))
    norms, scales = [], []
    for _ in range(5):
        train(engine, 1, first=3)
        norms.append(engine.get_global_grad_norm())
        scales.append(engine.loss_scale)
    assert scales == [16.0, 32.0, 64.0, 128.0, 256.0]
    assert norms == pytest.approx([norms[0]] * 5, rel=2e-2)


def check_counts() -> None:
    """Large counts are no reason for an overflow."""
    engine = engine_of(config=config_of(1, "fp16", fp16={"enabled": True, "initial_scale_power": 4}))
    half = SAMPLES // 2
    mine = slice(0, half) if engine.global_rank == 0 else slice(half, SAMPLES)
    x, target = (tensor[mine].half() for tensor in batch_of(0))
    engine.backward(engine(x, target), count=60000)
    engine.step()
    assert engine.was_step_applied() and engine.last is not None and engine.last.items == 120000
    _, losses, norms = plain(1)
    assert engine.last.loss == pytest.approx(losses[0], rel=1e-2)
    assert engine.last.grad_norm == pytest.approx(norms[0], rel=1e-2)
    assert_like(engine, plain(1)[0], 2e-2)


def test_counts(ranks: Any) -> None:
    ranks.run(check_counts, 2)


def check_native() -> None:
    """train_step, the front of pretrain_gpt.py, scales and unscales alike."""
    from tests.engine.toys import engine_of as native_engine
    from tests.engine.toys import masters, run_step

    half, wide = native_engine(precision="fp16", zero_stage=2, clip_grad=0.5), native_engine(clip_grad=0.5)
    half.scaler.scale = 256.0
    for step in range(3):
        found, wanted = run_step(half, step), run_step(wide, step)
        assert (found.skipped, found.loss) == (False, pytest.approx(wanted.loss, rel=1e-2))
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=2e-2)
    weights = masters(wide)
    for name, weight in masters(half).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-2)


def test_native_steps(ranks: Any) -> None:
    ranks.run(check_native, 2)
