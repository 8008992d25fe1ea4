"""DeepSpeed's schedules against values worked out by hand from its formulas, torch's by name, and every error."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megazero.base.errors import CheckpointError, ConfigError
from megazero.engine.schedulers import (
    LRRangeTest,
    OneCycle,
    Schedule,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    make_scheduler,
)

LOG = [math.log(n) / math.log(4) for n in (1, 2, 3, 4)]
PI = math.pi


def groups(*rates: float, **options: Any) -> Any:
    """All that a schedule needs of an optimizer."""
    return SimpleNamespace(param_groups=[{"lr": rate, **options} for rate in rates or (1.0,)])


def rates(kind: type[Schedule], steps: int, *arguments: Any, lr: float = 1.0, **named: Any) -> list[float]:
    """The learning rates in force before the first step() and after each."""
    optimizer = groups(lr)
    schedule = kind(optimizer, *arguments, **named)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        schedule.step()
        assert schedule.get_last_lr() == schedule.get_lr() == [optimizer.param_groups[0]["lr"]]
        found.append(optimizer.param_groups[0]["lr"])
    return found


CASES: list[tuple[type[Schedule], dict[str, Any], list[float]]] = [
    (LRRangeTest, {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2}, [0.1, 0.15, 0.2, 0.25, 0.3]),
    (
        LRRangeTest,
        {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2, "lr_range_test_staircase": True},
        [0.1, 0.1, 0.2, 0.2, 0.3],
    ),
    (
        LRRangeTest,
        {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 1, "lr_range_test_step_rate": 5.0},
        [0.1, 0.6, 1.1],
    ),
    (WarmupLR, {"warmup_num_steps": 4}, [0.0, *LOG, 1.0, 1.0]),
    (WarmupLR, {"warmup_num_steps": 4, "warmup_type": "linear"}, [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
    (
        WarmupLR,
        {"warmup_num_steps": 4, "warmup_type": "linear", "warmup_min_lr": 0.2, "warmup_max_lr": 0.6},
        [0.2, 0.2, 0.3, 0.4, 0.5, 0.6],
    ),
    (WarmupLR, {"warmup_num_steps": 1, "warmup_type": "linear"}, [0.0, 0.0, 0.5, 1.0]),
    (
        WarmupDecayLR,
        {"total_num_steps": 8, "warmup_num_steps": 4, "warmup_max_lr": 1.0},
        [0.0, *LOG, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0],
    ),
    (
        WarmupDecayLR,
        {
            "total_num_steps": 6,
            "warmup_num_steps": 2,
            "warmup_type": "linear",
            "warmup_min_lr": 0.5,
            "warmup_max_lr": 1.0,
        },
        [0.5, 0.5, 0.75, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5],
    ),
    (WarmupDecayLR, {"total_num_steps": 3, "warmup_num_steps": 2}, [0.0, 0.0, 0.001, 0.001, 0.0]),
    (
        WarmupCosineLR,
        {"total_num_steps": 8, "warmup_num_steps": 4, "cos_min_ratio": 0.2},
        [0.0, *LOG, *(0.2 + 0.4 * (1 + math.cos(PI * k / 4)) for k in (1, 2, 3, 4, 4))],
    ),
    (
        WarmupCosineLR,
        {"total_num_steps": 4, "warmup_num_steps": 2, "warmup_type": "linear", "warmup_min_ratio": 0.5},
        [0.0, 0.5, 0.75, 0.0001 + 0.9999 * 0.5, 0.0001, 0.0001],
    ),
    (
        OneCycle,
        {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4, "cycle_second_step_size": 2},
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1, 0.1, 0.1],
    ),
    (
        OneCycle,
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 0.5,
            "cycle_first_step_size": 2,
            "decay_step_size": 2,
            "decay_lr_rate": 0.5,
        },
        [0.1, 0.3, 0.5, 0.3, 0.1, 0.1 / 1.25, 0.1 / 1.5, 0.1 / 1.75],
    ),
    (
        OneCycle,
        {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 4, "cycle_first_stair_count": 2},
        [0.0, 0.0, 0.5, 0.5, 1.0, 0.5, 0.5, 0.0, 0.0],
    ),
    (
        OneCycle,
        {
            "cycle_min_lr": 0.0,
            "cycle_max_lr": 1.0,
            "cycle_first_step_size": 4,
            "cycle_first_stair_count": 2,
            "cycle_second_stair_count": 0,
        },
        [0.0, 0.0, 0.5, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0],
    ),
]


@pytest.mark.filterwarnings("ignore:OneCycle leaves the momentum alone")
@pytest.mark.parametrize(("kind", "arguments", "expected"), CASES)
def test_values(kind: type[Schedule], arguments: dict[str, Any], expected: list[float]) -> None:
    assert rates(kind, len(expected) - 1, **arguments) == pytest.approx(expected, abs=1e-12)


def test_defaults() -> None:
    assert rates(LRRangeTest, 1) == pytest.approx([1e-3, 1e-3 * (1 + 1 / 2000)])
    assert rates(WarmupLR, 3, lr=0.5)[-1] == pytest.approx(0.5 * math.log(3) / math.log(1000))
    assert rates(WarmupDecayLR, 3, 5000)[-1] == pytest.approx(0.001 * math.log(3) / math.log(1000))
    assert rates(WarmupCosineLR, 3, 5000, lr=0.5)[-1] == pytest.approx(0.5 * math.log(3) / math.log(1000))
    schedule = WarmupCosineLR(groups(), 2000)
    schedule.step(1999)
    assert schedule.get_last_lr() == pytest.approx([0.0001])
    cycle = OneCycle(groups(betas=(0.5, 0.5)), 0.1, 0.2)
    cycle.step(1999)
    assert cycle.get_last_lr() == pytest.approx([0.2]) and cycle.get_mom() == [(pytest.approx(0.8), 0.99)]


def test_each_group_has_its_own() -> None:
    optimizer = groups(1.0, 3.0)
    WarmupLR(optimizer, [0.5, 1.0], None, 4, "linear").step(2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 2.0]
    optimizer = groups(1.0, 3.0)
    WarmupCosineLR(optimizer, 10, warmup_num_steps=4, warmup_type="linear").step(2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.5]
    optimizer = groups(1.0, 3.0)
    LRRangeTest(optimizer, [0.1, 0.2], 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_momentum_is_mirrored_and_decays() -> None:
    optimizer = groups(betas=(0.7, 0.999))
    cycle = OneCycle(
        optimizer,
        0.1,
        0.5,
        cycle_first_step_size=2,
        decay_step_size=2,
        decay_mom_rate=0.1,
        cycle_min_mom=0.6,
        cycle_max_mom=0.8,
    )
    found = [optimizer.param_groups[0]["betas"]]
    for _ in range(6):
        cycle.step()
        found.append(optimizer.param_groups[0]["betas"])
    assert [beta for beta, _ in found] == pytest.approx([0.6, 0.7, 0.6, 0.7, 0.8, 0.8 * 1.05, 0.8 * 1.1])
    assert {second for _, second in found} == {0.99}
    alone = groups(betas=(0.7, 0.999))
    still = OneCycle(alone, 0.1, 0.5, cycle_momentum=False)
    still.step()
    assert alone.param_groups[0]["betas"] == (0.7, 0.999) and still.get_mom() is None
    with pytest.warns(UserWarning, match=r"no betas. Say cycle_momentum false"):
        OneCycle(groups(), 0.1, 0.5)


@pytest.mark.filterwarnings("ignore:OneCycle leaves the momentum alone")
@pytest.mark.parametrize(("kind", "arguments", "expected"), CASES)
def test_saved_and_gone_on(kind: type[Schedule], arguments: dict[str, Any], expected: list[float]) -> None:
    one = kind(groups(), **arguments)
    one.step()
    one.step()
    assert one.state_dict() == {"last_batch_iteration": 1}
    optimizer = groups()
    other = kind(optimizer, **arguments)
    other.load_state_dict(one.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[2])
    other.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[3] if len(expected) > 3 else other.get_lr()[0])
    other.load_state_dict({"last_batch_iteration": -1})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[0])
    with pytest.raises(
        CheckpointError, match=rf"entries base_lrs, but {kind.__name__}'s has last_batch_iteration alone"
    ):
        other.load_state_dict({"base_lrs": 3})


def test_made_in_the_middle() -> None:
    optimizer = groups(0.3)
    schedule = WarmupLR(optimizer, 0.0, 1.0, 4, "linear", last_batch_iteration=1)
    assert optimizer.param_groups[0]["lr"] == 0.3
    with pytest.raises(RuntimeError, match=r"made with last_batch_iteration 1, to go on from there. Call step"):
        schedule.get_last_lr()
    schedule.step()
    assert schedule.get_last_lr() == [0.5]
    schedule.step(1)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_learning_rate_in_a_tensor_stays_one() -> None:
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate)
    WarmupLR(optimizer, warmup_num_steps=4, warmup_type="linear").step(2)
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.5


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        *((kind, {"warmup_num_steps": bad}, "warmup_num_steps must be a whole number above 0, got") for kind in
          (WarmupLR, WarmupDecayLR, WarmupCosineLR) for bad in (0, -5, None, 1.5, True)),
        *((kind, {"warmup_type": "lnear"}, r"'lnear' is unknown. Did you mean 'linear'\? Give log or") for kind in
          (WarmupLR, WarmupDecayLR, WarmupCosineLR)),
        *((kind, {"total_num_steps": 0}, "total_num_steps must be a whole number above 0, got 0") for kind in
          (WarmupDecayLR, WarmupCosineLR)),
        *((LRRangeTest, {"lr_range_test_step_size": bad}, "lr_range_test_step_size must be") for bad in (0, -5)),
        (LRRangeTest, {"lr_range_test_min_lr": [1, 2]}, "lr_range_test_min_lr has 2 values, and the optimizer 1 param"),
        (WarmupLR, {"warmup_min_lr": [1, 2]}, "warmup_min_lr has 2 values.*Give one number for all, or 1"),
        (WarmupLR, {"warmup_max_lr": [1, 2]}, "warmup_max_lr has 2 values"),
        (OneCycle, {"cycle_min_lr": [1, 2]}, "cycle_min_lr has 2 values"),
        (OneCycle, {"cycle_max_lr": [1, 2]}, "cycle_max_lr has 2 values"),
        (OneCycle, {"cycle_min_mom": [1, 2]}, "cycle_min_mom has 2 values"),
        (OneCycle, {"cycle_max_mom": [1, 2]}, "cycle_max_mom has 2 values"),
        (OneCycle, {"cycle_first_step_size": 0}, "cycle_first_step_size 0: a number of steps above 0"),
        (OneCycle, {"cycle_second_step_size": -1}, "cycle_second_step_size -1: 0 or more steps"),
    ],
)  # fmt: skip
def test_bad_arguments(kind: Any, arguments: dict[str, Any], message: str) -> None:
    needed: dict[Any, dict[str, Any]] = {OneCycle: {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}}
    needed |= {WarmupDecayLR: {"total_num_steps": 2000}, WarmupCosineLR: {"total_num_steps": 2000}}
    optimizer = groups(0.7)
    with pytest.raises(ValueError, match=message):
        kind(optimizer, **(needed.get(kind, {}) | arguments))
    assert optimizer.param_groups == [{"lr": 0.7}]


def test_a_run_shorter_than_its_warmup() -> None:
    with pytest.warns(UserWarning, match="total_num_steps 10 is below warmup_num_steps 20"):
        WarmupDecayLR(groups(), 10, warmup_num_steps=20)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.5)


def test_by_name() -> None:
    arguments = {"total_num_steps": 100000, "warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 2000}
    made = make_scheduler("WarmupDecayLR", optimizer(), arguments | {"warmup_type": "linear"})
    made.step(1000)
    assert type(made) is WarmupDecayLR and made.get_last_lr() == [1.5e-4]
    for name, kind in (("lrrangetest", LRRangeTest), ("WARMUPLR", WarmupLR)):
        assert type(make_scheduler(name, groups(), None)) is kind
    assert type(make_scheduler("OneCycle", optimizer(), {"cycle_min_lr": 0, "cycle_max_lr": 1})) is OneCycle
    assert type(make_scheduler("WarmupCosineLR", groups(), {"total_num_steps": 2000})) is WarmupCosineLR
    step = make_scheduler("steplr", optimizer(), {"step_size": 3})
    assert type(step) is torch.optim.lr_scheduler.StepLR
    wrapped = make_scheduler("CosineAnnealingLR", SimpleNamespace(optimizer=optimizer()), {"T_max": 10})
    assert isinstance(wrapped.optimizer, torch.optim.AdamW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_scheduler("OneCycleLR", optimizer(), {"max_lr": 1.0, "total_steps": 5})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("WarmupDecay", {}, r"type 'WarmupDecay' is unknown. Did you mean 'WarmupDecayLR'\? There are .*OneCycle"),
        ("LRScheduler", {}, "type 'LRScheduler' is unknown"),
        ("LambdaLR", {}, "takes functions, other schedulers or a metric.*pass it as lr_scheduler"),
        ("ReduceLROnPlateau", {}, "takes functions"),
        (
            "WarmupLR",
            {"warmup_steps": 3},
            r"WarmupLR has no argument 'warmup_steps'. Did you mean 'warmup_num_steps'\?",
        ),
        ("WarmupDecayLR", {}, "scheduler WarmupDecayLR needs total_num_steps. State it"),
        ("OneCycle", {}, r"(?s)2 problems.*needs cycle_min_lr.*needs cycle_max_lr"),
        ("StepLR", {}, "scheduler StepLR needs step_size"),
        ("WarmupLR", {"warmup_num_steps": "auto"}, "warmup_num_steps 'auto': it was not resolved. State a number"),
        ("WarmupLR", {"warmup_num_steps": -1}, "warmup_num_steps must be a whole number above 0, got -1"),
        ("OneCycleLR", {"max_lr": 1.0}, "scheduler OneCycleLR with max_lr 1.0: You must define either total_steps"),
    ],
)
def test_errors_by_name(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(name, optimizer(), arguments)
