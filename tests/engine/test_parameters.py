"""Parameters of unusual kinds under initialize(): with sparse gradients, without elements, fp64, complex; and some that
leave the engine's memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.zero import GatheredParameters, safe_get_full_fp32_param
from tests.engine.fronts import LR, Regressor, assert_like, batch_of, config_of, engine_of, make, plain, train


class Bag(nn.Module):
    """An embedding whose gradient names only the rows that were used, twice in a forward; and an empty parameter."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 8, sparse=sparse)
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.zeros(2, 0), requires_grad=False)
        self.head = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.words(ids).mean(1) + self.words(ids.flip(1) % 7).sum(1)
        return self.head(found).square().mean() + self.nothing.sum()


def bag(sparse: bool) -> Bag:
    torch.manual_seed(3)
    return Bag(sparse)


def check_bag(stage: int) -> None:
    rank = dist.get_rank()
    alone, engine = bag(False), engine_of(bag(True), config_of(stage, gas=2, sparse_gradients=True))
    optimizer = torch.optim.AdamW(alone.parameters(), lr=LR)
    for step in range(3):
        ids = torch.randint(0, 40, (16, 5), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        alone(ids).backward()
        optimizer.step()
        for part in ids.chunk(2)[rank].chunk(2):
            engine.backward(engine(part))
            engine.step()
    assert_like(engine, alone)
    whole = engine.consolidated_state_dict()
    trained = engine.consolidated_state_dict(exclude_frozen_parameters=True)
    if rank == 0:
        assert whole["nothing"].shape == (0, 3) and whole["frozen"].shape == (2, 0)
        assert "nothing" in trained and "frozen" not in trained
        bag(False).load_state_dict(whole)  # strictly


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sparse_gradients_and_empty_parameters(ranks: Any, stage: int) -> None:
    ranks.run(check_bag, 2, stage)


def test_fp64_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_of(make().double())
    assert "8 parameters were torch.float64, blocks.0.weight for one: they are torch.float32" in capsys.readouterr().out
    with pytest.raises(RuntimeError) as caught:
        engine(batch_of(0)[0].double())
    (note,) = caught.value.__notes__
    assert note.endswith("The weights are torch.float32. If an input is not: cast it with .to(torch.float32).")
    engine_of(make())
    assert "float64" not in capsys.readouterr().out


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.phase).abs().sum()


def test_complex_parameters() -> None:
    for stage in (0, 3):
        with pytest.raises(
            ConfigError, match=r"phase is torch\.complex64, .*Keep torch\.view_as_real.*view_as_complex"
        ):
            engine_of(Wave(), config_of(stage))
    model = Wave()
    model.phase.requires_grad_(False)
    engine = engine_of(model)
    engine.backward(engine(torch.ones(2, 4)))
    engine.step()
    assert model.phase.dtype == torch.complex64


def rebound(model: Regressor) -> None:
    model.head.weight.data = model.head.weight.data.clamp(-0.1, 0.1)


def cast(model: Regressor) -> None:
    model.norm.to(torch.float64)


def moved(model: Regressor) -> None:
    model.norm.weight.data = model.norm.weight.data.clone()


LEAVING: dict[str, tuple[Callable[[Regressor], None], str]] = {
    "rebound": (rebound, "head.weight"),
    "cast": (cast, "norm"),
    "moved": (moved, "norm.weight"),
}


def check_leaving(stage: int, how: str) -> None:
    change, name = LEAVING[how]
    engine = engine_of(config=config_of(stage))
    train(engine, 1)
    change(engine.module)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"{name}.* has been given other memory.*modifier_rank=0; cast and move the"):
        engine.step()


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_that_has_left_is_an_error(ranks: Any, stage: int, how: str) -> None:
    ranks.run(check_leaving, 2, stage, how)


def check_staying(stage: int, precision: str) -> None:
    """What stays: in-place changes, moves that move nothing, swaps that are undone, other memory inside a block."""
    engine = engine_of(config=config_of(stage, precision))
    train(engine, 1)
    weight = engine.module.head.weight
    engine.module.to(engine.device).to(engine.precision.dtype)
    kept, weight.data = weight.data, torch.zeros_like(weight.data)
    weight.data = kept
    train(engine, 1, first=1)
    with GatheredParameters(weight, modifier_rank=0):
        weight.data = torch.full_like(weight.data, 0.5)
    assert (safe_get_full_fp32_param(weight) == 0.5).all()
    train(engine, 1, first=2)
    master = safe_get_full_fp32_param(weight)
    assert not (master == 0.5).any() and (master - 0.5).abs().max() < 3 * LR
    with GatheredParameters(weight):
        assert torch.equal(weight, master.to(weight.dtype)), "what the step has made is what forward uses"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_that_stays(ranks: Any, stage: int, precision: str) -> None:
    ranks.run(check_staying, 2, stage, precision)


def check_assigned(stage: int) -> None:
    engine = engine_of(config=config_of(stage))
    mine = list(engine.module.parameters())
    for keep in (True, False):  # torch keeps the wish in the state dict
        state = {name: value.clone() for name, value in plain(1)[0].state_dict().items()}
        engine.module.load_state_dict(state, assign=keep)
        assert all(a is b for a, b in zip(mine, engine.module.parameters(), strict=True))
        assert_like(engine, plain(1)[0], 0.0)
    engine.module.load_state_dict(make().state_dict(), assign=True)
    train(engine, 2)
    assert_like(engine, plain(2)[0])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_assigning_a_state_dict(ranks: Any, stage: int) -> None:
    ranks.run(check_assigned, 2, stage)


class Outside(Regressor):
    """The loss reads parameters of modules whose forward is over, from a list."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        listed = [p for module in self.modules() for p in module._parameters.values() if p is not None]
        return super().forward(x, target) + sum(p.square().sum() for p in listed)


def check_hint(stage: int, precision: str, told: bool) -> None:
    torch.manual_seed(7)
    engine = engine_of(Outside(), config_of(stage, precision))
    if stage < 3 or precision == "fp16":
        engine.module.register_forward_hook(lambda module, args, output: output * float("nan"))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        train(engine, 1)
    assert engine.skipped_steps == 1
    if dist.get_rank() == 0:
        assert "skipped: non-finite" in said.getvalue()
        assert ("reads some elsewhere, let it do so inside megazero.zero.Gather" in said.getvalue()) == told


@pytest.mark.parametrize(("stage", "precision", "told"), [(3, "fp32", True), (2, "fp32", False), (3, "fp16", False)])
def test_a_hint_where_nan_may_be_a_slice(ranks: Any, stage: int, precision: str, told: bool) -> None:
    ranks.run(check_hint, 2, stage, precision, told)
