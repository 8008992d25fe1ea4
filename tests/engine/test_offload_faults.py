"""Disks that fail while an engine trains: a clear error, no checkpoint of half a step, and the last one still loads."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megazero.base.errors import CheckpointError, OffloadError
from megazero.engine.engine import Engine
from megazero.zero import nvme
from tests.engine.fronts import config_of, engine_of, masters_of, train


def build(folder: Path, stage: int, precision: str) -> Engine:
    """All that may leave memory in files, in several buckets."""
    home = {"device": "nvme", "nvme_path": str(folder)}
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 100, "offload_optimizer": home}
    if stage == 3:
        zero["offload_param"] = home | {"max_in_cpu": 0}
    return engine_of(config=config_of(stage, precision, zero_optimization=zero))


def files_of(engine: Engine) -> list[Path]:
    store = engine.zero.homes.optimizer_store
    assert store is not None
    return sorted(store.folder.path.iterdir())


def check_goes_on(engines: list[Engine], saved: Path, straight: Engine, first: int = 0) -> None:
    """These load what was saved after `first` steps, and after two more have the weights of one that never stopped."""
    train(straight, first + 2)
    wanted = masters_of(straight)
    for engine in engines:
        engine.load_checkpoint(saved)
        train(engine, 2, first=first)
        assert all(torch.equal(weight, wanted[name]) for name, weight in masters_of(engine).items())


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "fp32")])
def test_a_disk_that_fills_in_the_middle_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    """The first step makes the files of the states: some buckets are updated when there is no more room."""
    engine = build(tmp_path, stage, precision)
    engine.save_checkpoint(tmp_path / "saved")
    real, made = nvme.reserve, []

    def reserve(path: Path, old: int, size: int, name: str) -> None:
        made.append(name)
        if len(made) > 3:
            raise OffloadError(f"no room for {name}")
        real(path, old, size, name)

    with monkeypatch.context() as patch:
        patch.setattr(nvme, "reserve", reserve)
        with pytest.raises(OffloadError, match="no room for"):
            train(engine, 1)
    for go_on in (lambda: engine.save_checkpoint(tmp_path / "torn"), lambda: train(engine, 1)):
        with pytest.raises(CheckpointError, match=r"partly those before it.*Resume from the last checkpoint"):
            go_on()
    assert not (tmp_path / "torn" / "latest").exists()
    engine.load_checkpoint(tmp_path / "saved", load_optimizer_states=False)
    with pytest.raises(CheckpointError, match="partly those before it"):  # moments are still of both steps
        train(engine, 1)
    check_goes_on([engine, build(tmp_path, stage, precision)], tmp_path / "saved", build(tmp_path, stage, precision))


def test_a_write_that_fails_is_not_told_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(tmp_path, 2, "bf16")
    train(engine, 2)
    engine.save_checkpoint(tmp_path / "saved")
    real = os.pwrite
    states = {str(path) for path in files_of(engine)[5:]}  # of a state, after the masters

    def pwrite(descriptor: int, *given: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") in states:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OffloadError, match="failed: Input/output error"):
            train(engine, 1, first=2)
    check_goes_on([engine], tmp_path / "saved", build(tmp_path, 2, "bf16"), 2)


def check_save(folder: Path, kind: str) -> None:
    """A file of one of two ranks is cut short, or its folder gone: both are told when they save."""
    engine = build(folder, 3, "bf16")
    train(engine, 2)
    engine.save_checkpoint(folder / "saved")
    if engine.topology.rank == 1:
        if kind == "cut":
            os.truncate(next(path for path in files_of(engine) if path.stat().st_size >= 512), 100)
        else:
            shutil.rmtree(files_of(engine)[0].parent)
    with pytest.raises(CheckpointError, match=r"saving in .* \(rank 1\): .*(ends after 100 of|cannot map)"):
        engine.save_checkpoint(folder / "broken")
    check_goes_on([build(folder, 3, "bf16")], folder / "saved", build(folder, 3, "bf16"), 2)


@pytest.mark.parametrize("kind", ["cut", "gone"])
def test_every_rank_is_told_of_a_file_that_cannot_be_saved(ranks: Any, tmp_path: Path, kind: str) -> None:
    ranks.run(check_save, 2, tmp_path, kind)


class Failing(torch.optim.AdamW):
    """Fails after its update, once it is told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.fails:
            raise KeyboardInterrupt


def test_an_update_that_is_interrupted_is_not_saved(tmp_path: Path) -> None:
    model = engine_of().module
    engine = engine_of(model, config_of(1), optimizer=lambda parameters: Failing(parameters, lr=1e-2))
    train(engine, 1)
    assert engine.shards is not None
    engine.shards.optimizer.fails = True  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        train(engine, 1, first=1)
    with pytest.raises(CheckpointError, match="an earlier step"):
        engine.save_checkpoint(tmp_path)
