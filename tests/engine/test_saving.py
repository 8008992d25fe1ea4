"""save_checkpoint and load_checkpoint of an engine that a script drives, and whole state dicts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megazero.base.errors import CheckpointError
from megazero.engine.engine import Engine
from megazero.engine.optimizer_record import check_fits
from megazero.engine.steps import latest_iteration
from tests.engine.fronts import (
    LR,
    SAMPLES,
    Regressor,
    batch_of,
    config_of,
    engine_of,
    make,
    masters_of,
    plain,
    train,
)

SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 5, "warmup_type": "linear"}}


def build(stage: int, precision: str = "fp32", **more: Any) -> Engine:
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}} if precision == "fp16" else {}
    return engine_of(config=config_of(stage, precision, clip=0.5, scheduler=SCHEDULER, **fp16, **more))


def check_resume(folder: Path, stage: int, precision: str) -> None:
    """Three steps, a checkpoint, three more: bitwise those of a run that stopped in between."""
    engine = build(stage, precision)
    train(engine, 3)
    assert engine.save_checkpoint(folder, client_state={"epoch": 2, "sizes": (1, 2)})
    train(engine, 3, first=3)
    other = build(stage, precision)
    path, client = other.load_checkpoint(folder)
    assert path == str(folder / "global_step3") and client == {"epoch": 2, "sizes": (1, 2)}
    assert (other.global_steps, other.micro_steps, other.skipped_steps) == (3, 3, 0)
    train(other, 3, first=3)
    assert other.get_lr() == engine.get_lr() and other.loss_scale == engine.loss_scale
    found, wanted = masters_of(other), masters_of(engine)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp16"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_resumes_bitwise(ranks: Any, tmp_path: Path, stage: int, precision: str) -> None:
    ranks.run(check_resume, 2, tmp_path, stage, precision)


def check_save(folder: Path, stage: int, tag: str) -> None:
    engine = build(stage)
    train(engine, 3)
    engine.save_checkpoint(folder, tag)


def check_load(folder: Path, stage: int, tag: str) -> None:
    """Any ranks and stage go on as the run that never stopped."""
    straight = build(1)
    train(straight, 5)
    engine = build(stage)
    engine.load_checkpoint(folder, tag)
    train(engine, 2, first=3)
    wanted = masters_of(straight)
    for name, value in masters_of(engine).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-5)
    assert engine.get_lr() == straight.get_lr()


def test_other_ranks_and_stages(ranks: Any, tmp_path: Path) -> None:
    for number, (size, stage) in enumerate([(1, 3), (2, 1), (2, 3)]):
        ranks.run(check_save, size, tmp_path, stage, f"step_{number}")
    for number in range(3):
        for size, stage in [(1, 0), (2, 2), (2, 3)]:
            ranks.run(check_load, size, tmp_path, stage, f"step_{number}")


def test_tags_and_latest(tmp_path: Path) -> None:
    engine = engine_of()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint\. Give the folder that save_checkpoint\(\)"):
        engine.load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"none does not exist.*if_exists=True"):
        engine.load_checkpoint(tmp_path / "none")
    assert engine.load_checkpoint(tmp_path, if_exists=True) == (None, {})
    assert engine.load_checkpoint(tmp_path, "a", if_exists=True) == (None, {})
    engine.save_checkpoint(tmp_path, "a")
    engine.save_checkpoint(tmp_path, "step_10", save_latest=False)
    assert (tmp_path / "latest").read_text() == "a\n"
    assert engine.load_checkpoint(str(tmp_path))[0] == str(tmp_path / "a")
    assert engine.load_checkpoint(tmp_path, tag="step_10")[0] == str(tmp_path / "step_10")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint of tag b\. Usable tags here: a, step_10; .*tag=…"):
        engine.load_checkpoint(tmp_path, "b")
    for tag in ("../a", ".a", "a/b", "latest"):
        with pytest.raises(CheckpointError, match=r"cannot name a checkpoint's folder.*'global_step10'"):
            engine.save_checkpoint(tmp_path, tag)
    with pytest.raises(CheckpointError, match=r"a script saved with engine\.save_checkpoint\(\); a run of"):
        latest_iteration(tmp_path)
    (tmp_path / "latest").write_text("gone\n")
    with pytest.raises(CheckpointError, match=r"latest is damaged: it reads .*gone.*Usable tags here: a, step_10"):
        engine.load_checkpoint(tmp_path)


def check_tags_differ(folder: Path) -> None:
    engine = engine_of()
    with pytest.raises(CheckpointError, match=r"ranks save under different tags: a0, a1\. Give the same on all"):
        engine.save_checkpoint(folder, f"a{engine.global_rank}")
    with pytest.raises(CheckpointError, match=r"\(rank 1\): client_state\['x'\] is a object"):
        engine.save_checkpoint(folder, client_state={"x": object() if engine.global_rank else 1})
    assert not list(folder.iterdir())


def test_what_ranks_must_agree_on(ranks: Any, tmp_path: Path) -> None:
    ranks.run(check_tags_differ, 2, tmp_path)


def test_client_state_comes_back_as_it_went(tmp_path: Path) -> None:
    engine = engine_of()
    state = {
        "a": (1, [2.5, float("inf")], None, True),
        3: "three",
        "tensor": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "empty": torch.zeros(0, 2),
        "array": np.arange(3.0),
        "number": np.float32(0.5),
        "~odd": {"nested": (1,)},
    }
    engine.save_checkpoint(tmp_path, client_state=state)
    found = engine.load_checkpoint(tmp_path)[1]
    assert found.keys() == state.keys()
    for key in ("a", 3, "number", "~odd"):
        assert found[key] == state[key] and type(found[key]) in (tuple, str, float, dict)
    assert torch.equal(found["tensor"], state["tensor"]) and found["tensor"].dtype == torch.bfloat16
    assert found["empty"].shape == (0, 2) and found["array"].tolist() == [0.0, 1.0, 2.0]


class Partly(Regressor):
    """With a frozen layer, a persistent buffer and another that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("table", torch.zeros(2), persistent=False)


def check_partly(folder: Path, stage: int) -> None:
    torch.manual_seed(7)
    engine = engine_of(Partly(), config_of(stage))
    with torch.no_grad():
        engine.running += 2.0
        engine.steps += 5
    train(engine, 1)
    engine.save_checkpoint(folder, "all")
    engine.save_checkpoint(folder, "lean", exclude_frozen_parameters=True)
    kept = engine.state_dict()["frozen.weight"].clone()
    for tag in ("all", "lean"):
        torch.manual_seed(8)
        other = engine_of(Partly(), config_of(stage))
        own = other.state_dict()["frozen.weight"].clone()
        assert not torch.equal(own, kept)
        other.load_checkpoint(folder, tag)
        found = other.state_dict()
        assert torch.equal(found["frozen.weight"], kept if tag == "all" else own)
        assert found["running"].tolist() == [2.0, 2.0] and found["steps"].item() == 5 and "table" not in found
        assert torch.equal(found["head.weight"], engine.state_dict()["head.weight"])
        lean = other.consolidated_state_dict(exclude_frozen_parameters=True)
        assert ("frozen.weight" in lean, "running" in lean) == (False, engine.global_rank == 0)


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_parameters_and_buffers(ranks: Any, tmp_path: Path, stage: int) -> None:
    ranks.run(check_partly, 2, tmp_path, stage)


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    engine = build(1)
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    wanted = masters_of(engine)

    def loaded(**choice: bool) -> Engine:
        other = build(1)
        other.load_checkpoint(tmp_path, **choice)  # type: ignore[arg-type]
        assert all(torch.equal(value, wanted[name]) for name, value in masters_of(other).items())
        return other

    module = loaded(load_module_only=True)
    assert (module.global_steps, module.shards.state_keys()) == (0, [])  # type: ignore[union-attr]
    weights = loaded(load_optimizer_states=False)
    assert (weights.global_steps, weights.shards.state_keys()) == (3, [])  # type: ignore[union-attr]
    assert weights.lr_scheduler.last_batch_iteration == engine.lr_scheduler.last_batch_iteration
    fresh = loaded(load_lr_scheduler_states=False)
    assert fresh.lr_scheduler.last_batch_iteration == build(1).lr_scheduler.last_batch_iteration
    bare = engine_of(config={"train_batch_size": SAMPLES})
    bare.load_checkpoint(tmp_path)
    assert all(torch.equal(value, wanted[name]) for name, value in bare.state_dict().items())


def test_another_model(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine, 1)
    engine.save_checkpoint(tmp_path)
    wider = make()
    wider.more = nn.Linear(2, 2)
    other = engine_of(wider)
    with pytest.raises(CheckpointError, match=r"checkpoint of another model:[\s\S]*more\.bias \[2\] is not in"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_module_strict=False)
    wanted = masters_of(engine)
    assert all(torch.equal(value, wanted[name]) for name, value in masters_of(other).items() if name in wanted)
    bare = engine_of(config={"train_batch_size": SAMPLES})
    bare.save_checkpoint(tmp_path, "bare")
    with pytest.raises(CheckpointError, match=r"by an engine without an optimizer.*load_optimizer_states=False"):
        engine.load_checkpoint(tmp_path, "bare")
    engine.load_checkpoint(tmp_path, "bare", load_optimizer_states=False)


ADAMW = {"type": "AdamW", "params": {"lr": LR}}


def check_misfit(folder: Path) -> None:
    """States of another optimizer are refused on every rank, before anything has changed."""
    sgd = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
    bare = {"type": "SGD", "params": {"lr": 0.1}}
    for tag, settings in (("adamw", ADAMW), ("sgd", sgd), ("bare", bare)):
        engine = engine_of(config=config_of(optimizer=settings))
        train(engine, 2)
        engine.save_checkpoint(folder, tag)
    kept = masters_of(engine)
    message = r"has the states of AdamW \(exp_avg, exp_avg_sq\).*optimizer is SGD, which keeps others \(none\)\. "
    with pytest.raises(CheckpointError, match=message + r"Load it with load_optimizer_states=False.*with AdamW"):
        engine.load_checkpoint(folder, "adamw")
    assert engine.get_lr() == [0.1] and engine.global_steps == 2
    assert all(torch.equal(value, kept[name]) for name, value in masters_of(engine).items())
    engine.load_checkpoint(folder, "adamw", load_optimizer_states=False)
    assert engine.get_lr() == [0.1]
    lion = {"type": "Lion", "params": {"lr": 1e-3}}
    lamb = {"type": "Lamb", "params": {"lr": 1e-3}}
    for settings, tag, fits in [
        (sgd, "adamw", False),
        (ADAMW, "sgd", False),
        (ADAMW, "bare", False),
        (lion, "adamw", False),
        (sgd, "bare", True),
        (bare, "sgd", True),
        (ADAMW | {"params": {"lr": 1.0, "betas": [0.5, 0.5], "amsgrad": True}}, "adamw", True),
        ({"type": "FusedAdam", "params": {"lr": LR}}, "adamw", True),
        (lamb, "adamw", True),  # another family, with states of the same names
    ]:
        other = engine_of(config=config_of(optimizer=settings))
        if fits:
            other.load_checkpoint(folder, tag)
            train(other, 1, first=2)
            continue
        with pytest.raises(CheckpointError, match="load_optimizer_states=False"):
            other.load_checkpoint(folder, tag)


def test_states_of_another_optimizer(ranks: Any, tmp_path: Path) -> None:
    ranks.run(check_misfit, 2, tmp_path)


class Holding(torch.optim.Optimizer):
    """A script's own optimizer, which keeps `speed`."""

    element_wise = True

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter].setdefault("speed", torch.zeros_like(parameter)).add_(parameter.grad)
                parameter.data.sub_(0.1 * self.state[parameter]["speed"])


def test_checkpoints_that_do_not_say_whose_states_they_are() -> None:
    where, settings = Path("here"), [{"lr": LR}]
    for stored, fits in [(["speed"], True), (["exp_avg"], False), ([], True)]:
        optimizer = Holding([nn.Parameter(torch.zeros(2))])
        if fits:
            check_fits(optimizer, {"states": stored}, settings, where)
            continue
        with pytest.raises(CheckpointError, match=r"of another optimizer \(exp_avg\).*is Holding.*others \(speed\)"):
            check_fits(optimizer, {"states": stored}, settings, where)
    assert not optimizer.state


def test_a_checkpoint_of_a_pretraining_run(store: Path) -> None:
    with pytest.raises(CheckpointError, match=r"saved by pretrain_gpt\.py, not by engine.*pretrain_gpt\.py --load"):
        engine_of().load_checkpoint(store)


def test_random_states_come_back(tmp_path: Path) -> None:
    engine = engine_of()
    engine.save_checkpoint(tmp_path)

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    wanted = draw()
    assert draw() != wanted
    engine.load_checkpoint(tmp_path)
    assert draw() == wanted


def check_position(folder: Path, save: bool) -> list[float]:
    data = [(batch_of(0)[0][i % SAMPLES] + i, torch.tensor(float(i))) for i in range(40)]
    engine = engine_of(config=config_of() | {"train_batch_size": 4}, training_data=data)
    seen: list[float] = []
    engine.module.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[1].tolist()))
    if save:
        for _ in range(3):
            engine.train_batch()
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    seen.clear()
    for _ in range(8):  # beyond the end of the epoch
        engine.train_batch()
    return seen


def test_data_goes_on_where_it_was(ranks: Any, tmp_path: Path) -> None:
    (one,) = ranks.run(check_position, 1, tmp_path, True)
    (same,) = ranks.run(check_position, 1, tmp_path, False)
    assert same == one
    both = ranks.run(check_position, 2, tmp_path, False)
    for step in range(8):
        of_ranks = [value for rank in both for value in rank[2 * step : 2 * step + 2]]
        assert sorted(of_ranks) == sorted(one[4 * step : 4 * step + 4])


def check_whole(stage: int) -> None:
    """Ordinary dicts at every stage: out, into torch, and in again; shared weights under each of their names."""
    torch.manual_seed(7)
    model = Regressor()
    model.tied = model.blocks[0]
    engine = engine_of(model, config_of(stage, "bf16"))
    train(engine, 1)
    state = engine.state_dict()
    reference = Regressor()
    reference.tied = reference.blocks[0]
    assert list(state) == list(reference.state_dict()) and not any(v.requires_grad for v in state.values())
    reference.bfloat16().load_state_dict(state)
    fp32, half = engine.consolidated_state_dict(fp32=True), engine.consolidated_state_dict()
    if engine.global_rank == 0:
        assert fp32.keys() == half.keys() == state.keys()
        assert all(torch.equal(half[name], state[name]) for name in state)
        assert all(torch.equal(half[name], fp32[name].bfloat16()) for name in state)
        assert {value.device.type for value in half.values()} == {"cpu"}
    else:
        assert (fp32, half) == ({}, {})
    wanted = plain(2)[0].state_dict()
    missing, unexpected = engine.load_state_dict(wanted | tied(wanted))
    assert not missing and not unexpected
    assert all(torch.equal(value, wanted[name]) for name, value in masters_of(engine).items() if name in wanted)
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        engine.load_state_dict({k: v for k, v in wanted.items() if k != "head.bias"} | tied(wanted))
    found = engine.load_state_dict({"nothing": torch.zeros(1)}, strict=False)
    assert found.unexpected_keys == ["nothing"] and len(found.missing_keys) == len(state)


def tied(state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("blocks.0", "tied"): value for name, value in state.items() if name.startswith("blocks.0")}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_whole_state_dicts(ranks: Any, stage: int) -> None:
    ranks.run(check_whole, 2, stage)


def check_16bit(folder: Path) -> None:
    engine = engine_of(config=config_of(3, "fp16"))
    assert engine.zero_gather_16bit_weights_on_model_save()
    assert engine.save_16bit_model(folder / "out", "model.bin")
    names = engine._zero3_consolidated_16bit_state_dict().keys()
    assert names == engine._consolidated_16bit_state_dict().keys()
    if engine.global_rank == 0:
        state = torch.load(folder / "out" / "model.bin", weights_only=True)
        assert state.keys() == names and {value.dtype for value in state.values()} == {torch.float16}
        make().half().load_state_dict(state)
    (folder / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"saving model\.bin in .*Give a folder that rank 0 can write to"):
        engine.save_16bit_model(folder / "file", "model.bin")


def test_save_16bit_model(ranks: Any, tmp_path: Path) -> None:
    ranks.run(check_16bit, 2, tmp_path)
