"""Traces of the dynamic loss scale, worked out by hand from DeepSpeed's rules, and every error."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from megazero.base.errors import CheckpointError, ConfigError, NonFiniteError
from megazero.engine.scaler import LARGEST, LossScaler

SMALL: dict[str, Any] = {"initial_loss_scale": 64.0, "loss_scale_window": 2, "hysteresis": 1}


def trace(outcomes: str, **settings: Any) -> list[float]:
    """Scales after each step; `.` is a clean one, `x` an overflow."""
    scaler = LossScaler(**(SMALL | settings))
    scales = []
    for outcome in outcomes:
        scaler.update(outcome == "x")
        scales.append(scaler.scale)
    return scales


def test_defaults() -> None:
    scaler = LossScaler()
    assert scaler.dynamic and scaler.scale == 65536.0
    assert (scaler.window, scaler.hysteresis, scaler.consecutive, scaler.minimum) == (1000, 2, False, 1.0)


@pytest.mark.parametrize(
    ("outcomes", "settings", "scales"),
    [
        # the first clean step does not count: growth at the third, then at every second
        (".......", {}, [64, 64, 128, 128, 256, 256, 512]),
        ("..", {"loss_scale_window": 1}, [64, 128]),
        # an overflow halves and starts the window anew
        ("..x....", {}, [64, 64, 32, 32, 32, 64, 64]),
        ("xxx", {}, [32, 16, 8]),
        # hysteresis 2: the first overflow is let pass, every later one halves until a growth refills it
        ("xxx", {"hysteresis": 2}, [64, 32, 16]),
        ("x.x.x", {"hysteresis": 2}, [64, 64, 32, 32, 16]),
        ("x...x", {"hysteresis": 2}, [64, 64, 64, 128, 128]),
        ("xx...xx", {"hysteresis": 2}, [64, 32, 32, 32, 64, 64, 32]),
        # refilled by any clean step
        ("x.x.xx", {"hysteresis": 2, "consecutive_hysteresis": True}, [64, 64, 64, 64, 64, 32]),
        ("xxxx.xx", {"hysteresis": 3, "consecutive_hysteresis": True}, [64, 64, 32, 16, 16, 16, 16]),
        # never below the minimum, which need not be whole or a power of two
        ("xx", {"min_loss_scale": 20.0}, [32, 20]),
        ("xx", {"initial_loss_scale": 1.0, "min_loss_scale": 0.25}, [0.5, 0.25]),
        ("xx", {"initial_loss_scale": 1.5e-8, "min_loss_scale": 1e-8}, [1e-8]),
        # a constant
        ("x.x....", {"loss_scale": 128.0}, [128] * 7),
    ],
)
def test_trace(outcomes: str, settings: dict[str, Any], scales: list[float]) -> None:
    assert trace(outcomes[: len(scales)], **settings) == scales


def test_growth_ends_where_fp32_does() -> None:
    assert trace("....", initial_loss_scale=LARGEST / 2, loss_scale_window=1)[-1] == LARGEST


def test_overflow_at_the_minimum() -> None:
    scaler = LossScaler(**(SMALL | {"initial_loss_scale": 2.0, "hysteresis": 2}))
    scaler.update(True)
    scaler.update(True)
    assert scaler.scale == 1.0
    with pytest.raises(NonFiniteError, match=r"loss scale 1, the smallest allowed \(min_loss_scale 1\).*train in bf16"):
        scaler.update(True)


def test_what_it_says() -> None:
    scaler = LossScaler(**(SMALL | {"hysteresis": 3}))
    assert scaler.update(False) is None
    assert str(scaler.update(True)).endswith("loss scale 64, which halves at the second overflow from here")
    assert str(scaler.update(True)).endswith("loss scale 64, which halves at the next overflow from here")
    assert scaler.update(True) == "gradients overflowed at loss scale 64; it is 32 from here"
    assert LossScaler(loss_scale=8.0).update(True) == "gradients overflowed at the constant loss scale 8"
    assert LossScaler(loss_scale=8.0).update(False) is None


def test_state_is_plain_and_goes_on() -> None:
    for cut in range(12):
        outcomes = "..x.x...xx.x"
        one, other = LossScaler(**SMALL | {"hysteresis": 2}), LossScaler(**SMALL | {"hysteresis": 2})
        for outcome in outcomes[:cut]:
            one.update(outcome == "x")
        other.load(json.loads(json.dumps(one.state())))
        for outcome in outcomes[cut:]:
            one.update(outcome == "x")
            other.update(outcome == "x")
        assert one.state() == other.state()


def test_the_configuration_has_the_last_word() -> None:
    state = LossScaler(**SMALL | {"hysteresis": 5}).state()
    constant = LossScaler(loss_scale=2.0)
    constant.load(state)
    assert constant.scale == 2.0
    narrow = LossScaler(hysteresis=1, min_loss_scale=100.0)
    narrow.load(state)
    assert narrow.scale == 100.0 and narrow.state()["hysteresis_left"] == 1


def test_a_foreign_state() -> None:
    with pytest.raises(
        CheckpointError, match=r"has the entries cur_scale, expected hysteresis_left, .*Start from its weights"
    ):
        LossScaler().load({"cur_scale": 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_scale": -1.0}, r"loss_scale -1: it is 0 \(dynamic\) or positive.*Give 0"),
        ({"loss_scale_window": 0}, "loss_scale_window 0: it is 1 or more. Give 1000"),
        ({"hysteresis": 0}, "hysteresis 0: it is 1 or more. Give 2"),
        ({"min_loss_scale": 0.0}, "min_loss_scale 0: it is positive.*Give 1"),
        ({"initial_loss_scale": 0.5}, "initial_loss_scale 0.5 with min_loss_scale 1: it lies between.*Give 65536"),
        ({"hysteresis": 0, "loss_scale": -1.0}, "2 problems"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossScaler(**settings)


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import megazero.engine.scaler as s; s.LossScaler().update(True)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
