"""The JSON blocks: read, and trained with for a few steps on 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import read_deepspeed
from tests.harness import Ranks
from tests.seeds.blocks import blocks, place, settings
from tests.seeds.table import ROWS
from tests.seeds.tiny import Model, train

PARTS = [name for name, row in ROWS.items() if blocks()[name].language == "json" and "2 ranks, 3 steps" in row.ran]
FP16 = ("S2 4.2 fp16", "S2 13.1 json")
NEEDS = {"S2 8.1", "S2 9.2"}  # tested with their code, in test_code.py


def check_trains(folder: str, config: dict[str, Any], steps: int) -> dict[str, Any]:
    """The run's facts on this rank."""
    with place(folder, ds_config=config):
        import deepspeed

        torch.manual_seed(0)
        model = Model()
        optimizer = None if "optimizer" in config else torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config="ds_config.json")
        losses = train(engine, steps, dist.get_rank())
        weight = engine.consolidated_state_dict().get("head.weight")
        return {"losses": losses, "dtype": weight is not None and weight.dtype, "lr": engine.get_lr()[0]}


@pytest.mark.parametrize("name", [name for name in PARTS if name not in NEEDS])
def test_trains(name: str, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "local_nvme").mkdir()
    results = ranks.run(check_trains, 2, str(tmp_path), settings(name), 3)
    for result in results:
        assert all(0 < loss < 6 for loss in result["losses"]), results
    dtype = torch.float16 if name in FP16 else torch.bfloat16 if name == "S2 4.2 bf16" else torch.float32
    if name not in ("S2 4.1", "S2 4.4"):  # "auto" is bf16 on a GPU; rates that warm up from 0
        assert results[0]["dtype"] == dtype
        assert results[0]["losses"][-1] < results[0]["losses"][0]


def test_stages_and_offload_train_alike(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "local_nvme").mkdir()
    alike = ["S2 2.1", "S2 2.2", "S2 2.3", "S2 3.1", "S2 3.1 parameters", "S2 3.2"]
    losses = {name: ranks.run(check_trains, 2, str(tmp_path), settings(name), 3)[0]["losses"] for name in alike}
    for name in alike:
        assert losses[name] == pytest.approx(losses["S2 2.1"], rel=1e-6), name


def check_4_3(folder: str) -> None:
    with place(folder):
        import deepspeed

        model = Model()
        wrong = {**settings("S2 4.3"), "train_batch_size": 2048}
        with pytest.raises(ConfigError, match=r"2048(.|\n)*512"):
            deepspeed.initialize(model=model, config=wrong, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2))
    result = check_trains(folder, settings("S2 4.3"), 1)
    assert len(result["losses"]) == 64


def test_batch_sizes(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_4_3, 2, str(tmp_path))


def check_4_4(folder: str) -> list[float]:
    with place(folder):
        import deepspeed

        model = Model()
        engine, *_ = deepspeed.initialize(
            model=model, config=settings("S2 4.4"), optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2)
        )
        rates = []
        for _ in range(4):
            train_one(engine)
            rates.append(engine.get_lr()[0])
        return rates


def train_one(engine: Any) -> None:
    ids = torch.zeros(2, 4, dtype=torch.long, device=engine.device)
    engine.backward(engine(ids).float().square().mean())
    engine.step()


def test_rates_follow_the_formula(ranks: Ranks, tmp_path: Path) -> None:
    for rates in ranks.run(check_4_4, 2, str(tmp_path)):
        assert rates == pytest.approx([3e-4 * step / 2000 for step in range(4)], rel=1e-6)


def check_12_1(folder: str) -> None:
    with place(folder):
        import deepspeed

        config = settings("S2 12.1 json")
        with pytest.raises(ConfigError, match=r"total_num_steps: auto, .* Write it as a number"):
            deepspeed.initialize(model=Model(), config=config)
    config["scheduler"]["params"]["total_num_steps"] = 100
    check_trains(folder, config, 3)


def test_auto_without_the_trainer(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_12_1, 2, str(tmp_path))


def test_tensor_parallel_is_read() -> None:
    read = read_deepspeed(settings("S2 7.1 json"))
    assert read.settings["parallel.tensor_model_parallel_size"].value == 4
    assert {key for key, _ in read.report.ignored} == {"tensor_parallel.mpu", "tensor_parallel.tp_grain_size"}
