"""What goes to csv files, and that monitors fail soft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megazero.base.log import Log
from megazero.engine.monitors import Monitors
from tests.engine.fronts import config_of, engine_of, train


def check_files(folder: Path) -> None:
    sections = {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "a"}}
    train(engine_of(config=config_of(1, "fp16", **sections, fp16={"enabled": True, "initial_scale_power": 4})), 2)


def test_files(ranks: Any, tmp_path: Path) -> None:
    ranks.run(check_files, 2, tmp_path)
    lines = (tmp_path / "a" / "Train_Samples_lr.csv").read_text().splitlines()
    assert lines == ["step,Train/Samples/lr", "16,0.01", "32,0.01"]
    names = {"train_loss", "lr", "grad_norm", "loss_scale"}
    assert {path.stem.removeprefix("Train_Samples_") for path in (tmp_path / "a").iterdir()} == names


def test_they_fail_soft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    monitors = Monitors({"csv_monitor": {"output_path": str(tmp_path / "file"), "job_name": "a"}}, Log())
    assert "csv_monitor is off from here on, the run continues" in capsys.readouterr().err
    monitors.write(1, {"lr": 0.1})
    monitors = Monitors({"csv_monitor": {"output_path": str(tmp_path), "job_name": "b"}}, Log())
    (tmp_path / "b").rmdir()
    monitors.write(1, {"lr": 0.1, "loss_scale": None})
    assert "csv_monitor is off" in capsys.readouterr().err
