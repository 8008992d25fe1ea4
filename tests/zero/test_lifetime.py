"""An engine that nobody holds any more goes, with its memory, threads and process groups."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import megazero
from tests.zero.test_stages import Blocks, loss_of, make


def check_that_it_goes(stage: int, folder: str | None) -> None:
    offload = {"device": "nvme", "nvme_path": folder}
    zero = {"stage": stage} | ({} if folder is None else {"offload_optimizer": offload})
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
    }
    engine = megazero.initialize(model=make(Blocks), config=settings)[0]
    engine.backward(loss_of(engine, 0, 0, 0))
    engine.step()
    gone = [weakref.ref(thing) for thing in (engine.zero, engine.module, engine.zero.buckets[0])]
    del engine
    gc.collect()
    assert [ref() is None for ref in gone] == [True, True, True]


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_goes(ranks: Any, stage: int, tmp_path: Path) -> None:
    ranks.run(check_that_it_goes, 2, stage, None)
    ranks.run(check_that_it_goes, 2, stage, str(tmp_path))


def test_a_module_without_an_engine_keeps_nothing() -> None:
    layer = nn.Linear(2, 2)
    gone = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert gone() is None and torch.is_grad_enabled()
