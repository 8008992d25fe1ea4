"""What an engine prints about itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from megazero.engine.introspection import size, state_bytes
from tests.engine.fronts import config_of, engine_of, train


def check_lines() -> None:
    engine = engine_of(
        config=config_of(1, "fp16", fp16={"enabled": True, "initial_scale_power": 4}, steps_per_print=2)
        | {"wall_clock_breakdown": True, "memory_breakdown": True}
    )
    train(engine, 4)
    engine.backward(engine(*[t.half() for t in _inputs()]), count=10)
    engine.step()
    train(engine, 1)


def _inputs() -> tuple[Any, Any]:
    from tests.engine.fronts import batch_of

    return batch_of(0)


def test_lines_every_so_many_steps(ranks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.run(check_lines, 2)
    text = capsys.readouterr().out
    lines = [line.removeprefix("[rank 0] ") for line in text.splitlines()]
    assert not any("[rank 1]" in line for line in lines)
    assert re.search(r"config: \d+ keys: \d+ used, \d+ translated, \d+ ignored", text)
    held = r"training state: [\d.]+ KiB on the fullest of 2 ranks, max/min 1\.000"
    assert any(re.fullmatch(held, line) for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    speed = r"[\d.e+]+ samples/s( \| [\d.e+]+ tokens/s)?"
    pattern = rf"step (\d) \| loss [\d.]+ \| {speed} \| lr 1\.000e-02 \| grad norm [\d.]+ \| loss scale 16"
    assert [(re.fullmatch(pattern, line) or [""])[1] for line in steps] == ["2", "4", "6"]
    assert ["tokens/s" in line for line in steps] == [False, False, True]
    clocks = [line for line in lines if "ms a step, slowest rank:" in line]
    assert len(clocks) == 3
    assert all(f"{name} " in clocks[0] for name in ("forward", "backward", "reduce", "step", "gather"))
    memory = [line for line in lines if "memory, fullest rank:" in line]
    assert len(memory) == 3
    for name in ("weights", "gradients", "master weights", "optimizer state", "activations and other"):
        assert f"{name} " in memory[0]


def test_silence_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    train(engine_of(), 3)
    assert "step " not in capsys.readouterr().out


def check_bytes(stage: int) -> dict[str, int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4096, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32))
    engine = engine_of(model, config_of(stage, "bf16"))
    engine.backward(engine(torch.arange(8)).float().square().mean())
    engine.step()
    assert engine.shards is not None
    return state_bytes(engine.module, engine.zero, engine.shards)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_of_each_stage(ranks: Any, stage: int) -> None:
    """Bytes per parameter as ZeRO's table says, the same on every rank, for one huge and many tiny parameters."""
    first, second = ranks.run(check_bytes, 2, stage)
    elements = 4096 * 32 + 64 + 2 * (32 * 32 + 32)
    shares = {  # of one parameter's bytes, on 2 ranks
        "weights": 2 / (2 if stage == 3 else 1),
        "gradients": 4 / (2 if stage >= 2 else 1),
        "master weights": 4 / (2 if stage else 1),
        "optimizer state": 8 / (2 if stage else 1),
    }
    for found in (first, second):
        assert {k: v / elements for k, v in found.items()} == pytest.approx(shares, rel=0.05)
    assert max(sum(first.values()), sum(second.values())) <= 1.01 * min(sum(first.values()), sum(second.values()))


def test_sizes_for_people() -> None:
    assert [size(n) for n in (12, 2048, 5 * 2**20, 3 * 2**30, 2**42)] == [
        "12 B",
        "2.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
        "4.0 TiB",
    ]
