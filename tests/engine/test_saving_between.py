"""Checkpoints and gradient accumulation: another number of micro-batches a step, and loading in the middle of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.fronts import assert_like, config_of, engine_of, parts_of, plain, train


def check_other_accumulation(folder: Path, stage: int, first: int, then: int) -> None:
    """Three steps with `first` micro-batches each, two with `then`."""
    engine = engine_of(config=config_of(stage, gas=first))
    train(engine, 3)
    engine.save_checkpoint(folder)
    other = engine_of(config=config_of(stage, gas=then))
    other.load_checkpoint(folder)
    assert not other.is_gradient_accumulation_boundary() or then == 1
    train(other, 2, first=3)
    assert other.global_steps == 5
    assert_like(other, plain(5)[0])


@pytest.mark.parametrize(("stage", "first", "then"), [(1, 1, 4), (3, 2, 4), (2, 4, 1)])
def test_another_accumulation(ranks: Any, tmp_path: Path, stage: int, first: int, then: int) -> None:
    ranks.run(check_other_accumulation, 2, tmp_path, stage, first, then)


def check_middle(folder: Path, stage: int, module_only: bool) -> None:
    """Saved and loaded after one of two micro-batches, whose gradients are not saved: the step begins anew."""
    engine = engine_of(config=config_of(stage, gas=2))
    if not module_only:
        train(engine, 3)
    (x, target), _ = parts_of(9, engine)
    engine.backward(engine(x, target * 50))
    engine.step()
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder, load_module_only=module_only)
    new = engine_of(config=config_of(stage, gas=2))
    new.load_checkpoint(folder, load_module_only=module_only)
    for other in (engine, new):
        first = other.global_steps
        train(other, 2, first=first)
        assert other.global_steps == first + 2 == (2 if module_only else 5)
        assert_like(other, plain(first + 2)[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_the_middle_of_an_accumulation(ranks: Any, tmp_path: Path, stage: int) -> None:
    for module_only in (False, True):
        ranks.run(check_middle, 2, tmp_path / str(module_only), stage, module_only)
