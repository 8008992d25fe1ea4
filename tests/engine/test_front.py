"""The loop of initialize(): forward, backward, step, against plain torch on the same global batch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.engine.engine import Engine
from megazero.parallel.collectives import Pending
from megazero.parallel.topology import Topology
from megazero.zero import zero as zero_module
from tests.engine.fronts import (
    LR,
    SAMPLES,
    WIDTH,
    Regressor,
    assert_like,
    batch_of,
    config_of,
    engine_of,
    make,
    masters_of,
    parts_of,
    plain,
    train,
)

STEPS = 10


def scaled(precision: str) -> dict[str, Any]:
    """A loss scale at which nothing overflows."""
    return {"fp16": {"enabled": True, "initial_scale_power": 8}} if precision == "fp16" else {}


def check_plain(stages: list[int], gas: int, clip: float) -> None:
    model, losses, norms = plain(STEPS, clip)
    first: dict[str, Tensor] = {}
    for stage in stages:
        engine = engine_of(config=config_of(stage, gas=gas, clip=clip))
        for step in range(STEPS):
            train(engine, 1, first=step)
            assert engine.last is not None and engine.was_step_applied()
            assert engine.last.loss == pytest.approx(losses[step], rel=1e-6)
            assert engine.get_global_grad_norm() == pytest.approx(norms[step], rel=1e-5)
        assert (engine.global_steps, engine.skipped_steps, engine.micro_steps) == (STEPS, 0, STEPS * gas)
        assert_like(engine, model)
        first = first or masters_of(engine)
        if gas == 1:  # the same order of summation
            assert all(torch.equal(weight, first[name]) for name, weight in masters_of(engine).items())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("gas", "clip"), [(1, 0.0), (4, 0.3)])
def test_equals_plain_adamw_at_every_stage(ranks: Any, size: int, gas: int, clip: float) -> None:
    ranks.run(check_plain, size, [0, 1, 2, 3], gas, clip)


def check_half(stages: list[int], precision: str, gas: int) -> None:
    """Gradients of 16-bit weights go into fp32 masters; plain fp32 training stays near, and stages agree."""
    model, losses, _ = plain(STEPS)
    found = []
    for stage in stages:
        engine = engine_of(config=config_of(stage, precision, gas, **scaled(precision)))
        seen = []
        for step in range(STEPS):
            train(engine, 1, first=step)
            assert engine.last is not None
            seen.append(engine.last.loss)
        assert seen == pytest.approx(losses, rel=0.05)
        assert_like(engine, model, 2e-2)
        assert {p.dtype for p in engine.module.parameters()} == {engine.precision.dtype}
        found.append(masters_of(engine))
    for other in found[1:]:
        for name, weight in other.items():
            torch.testing.assert_close(weight, found[0][name], rtol=0, atol=1e-6 if gas == 1 else 2e-3)


@pytest.mark.parametrize(("precision", "gas"), [("bf16", 1), ("bf16", 4), ("fp16", 1)])
def test_16_bits(ranks: Any, precision: str, gas: int) -> None:
    ranks.run(check_half, 2, [0, 1, 2, 3], precision, gas)


def check_backward(stage: int, precision: str, gas: int) -> None:
    """Ways to say the same: engine.backward, loss.backward, engine.scale, two losses, optimizer.step."""
    settings = config_of(stage, precision, gas)

    def run(backward: Any) -> dict[str, Tensor]:
        engine = engine_of(config=settings)
        train(engine, 3, backward=backward)
        assert engine.global_steps == 3
        return masters_of(engine)

    wanted = run(None)

    def halves(engine: Engine, loss: Tensor) -> None:
        engine.backward(loss * 0.25, retain_graph=True)
        engine.backward(loss * 0.75)

    def counted(engine: Engine, loss: Tensor) -> None:
        engine.backward(loss, count=SAMPLES // gas / engine.topology.size("dp"))

    ways: list[Any] = [
        lambda engine, loss: loss.backward(),
        lambda engine, loss: engine.scale(loss).backward(),
        lambda engine, loss: engine.backward(loss / gas, scale_wrt_gas=False),
        halves,
        counted,
    ]
    for way in ways:
        for name, weight in run(way).items():
            torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-6 if precision == "fp32" else 5e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ways_to_say_backward(ranks: Any, stage: int) -> None:
    ranks.run(check_backward, 2, stage, "fp32", 2)
    ranks.run(check_backward, 2, stage, "fp16", 1)


def check_no_sync(stage: int) -> None:
    """Held back or not, forced or counted: the sums are equal."""
    model, _, _ = plain(2)
    group = Topology.build().group("dp")
    for forced in (False, True):
        engine = engine_of(config=config_of(stage, gas=1))
        for step in range(2):
            mine = [tensor.chunk(group.size)[group.rank].chunk(4) for tensor in batch_of(step)]
            parts = list(zip(*mine, strict=True))
            for index, (x, target) in enumerate(parts):
                last = index == len(parts) - 1
                engine.set_gradient_accumulation_boundary(last if forced else None)
                with nullcontext() if last or forced else engine.no_sync():
                    engine.backward(engine(x, target) / 4)
                    if forced:
                        assert engine.is_gradient_accumulation_boundary() == last
                        engine.step()
                    elif not last:
                        with pytest.raises(RuntimeError, match=r"step\(\) inside no_sync\(\).*after the block"):
                            engine.step()
            if not forced:
                engine.step()
        assert engine.global_steps == 2
        assert_like(engine, model)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_sync_and_forced_boundaries(ranks: Any, stage: int) -> None:
    ranks.run(check_no_sync, 2, stage)


def check_counts() -> None:
    """A mean over all ranks' items, not a mean of means."""
    rank = Topology.build().rank
    x, target = batch_of(0)
    cut = 3  # samples of rank 0
    mine = slice(0, cut) if rank == 0 else slice(cut, SAMPLES)
    engine = engine_of()
    loss = engine(x[mine], target[mine])
    back = engine.backward(loss, count=torch.tensor(float(len(x[mine]))))
    assert torch.equal(back, loss.detach())
    engine.step()
    model, losses, norms = plain(1)
    assert engine.last is not None
    assert (engine.last.loss, engine.last.items) == (pytest.approx(losses[0], rel=1e-6), SAMPLES)
    assert engine.last.grad_norm == pytest.approx(norms[0], rel=1e-5)
    assert_like(engine, model)
    engine.backward(engine(x, target))
    with pytest.raises(RuntimeError, match=r"mean of `count` items after one that is a mean of a micro-batch"):
        engine.backward(engine(x, target), count=4)


def test_counts(ranks: Any) -> None:
    ranks.run(check_counts, 2)


def test_zero_grad_forgets_a_step_but_not_an_accumulation() -> None:
    for gas in (1, 2):
        engine = engine_of(config=config_of(gas=gas))
        parts = parts_of(0, engine)
        if gas == 1:
            x, target = parts[0]
            engine.backward(engine(x, target * 100))
            engine.zero_grad()
        for x, target in parts:
            assert engine.optimizer is not None
            engine.optimizer.zero_grad()  # in the middle of an accumulation it does nothing
            engine.backward(engine(x, target))
            engine.optimizer.step()
        assert engine.global_steps == 1
        assert_like(engine, plain(1)[0])


def check_unused() -> None:
    """A parameter that nothing used keeps its value, as in torch, whatever its weight decay."""
    for stage in (0, 1, 2, 3):
        model = make()
        model.extra = nn.Linear(4, 4)
        before = model.extra.weight.detach().clone()
        engine = engine_of(model, config_of(stage))
        train(engine, 2)
        found = masters_of(engine)
        assert torch.equal(found.pop("extra.weight"), before) and found.pop("extra.bias") is not None
        wanted, _, _ = plain(2)
        for name, weight in found.items():
            torch.testing.assert_close(weight, wanted.state_dict()[name], rtol=0, atol=2e-5)


def test_unused_parameters(ranks: Any) -> None:
    ranks.run(check_unused, 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_parameter_that_thaws_is_told_of(stage: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen at initialize(), it is not trained later; one that was trained may freeze and thaw."""
    model = make()
    model.blocks[0].weight.requires_grad_(False)
    engine = engine_of(model, config_of(stage))
    before = masters_of(engine)["blocks.0.weight"].clone()
    engine.module.head.bias.requires_grad_(False)
    train(engine, 1)
    engine.module.head.bias.requires_grad_(True)
    train(engine, 1)
    assert "not trained" not in capsys.readouterr().err
    engine.module.blocks[0].weight.requires_grad_(True)
    train(engine, 2)
    said = capsys.readouterr().err
    assert said.count("blocks.0.weight needed no gradient when initialize() was called, and need") == 1
    assert said.count("they are not trained. Call initialize() again after requires_grad_(True), or let") == 1
    assert torch.equal(masters_of(engine)["blocks.0.weight"], before)


# a batch at a time


class Losses(Regressor):
    """Gives its loss in different wrappings."""

    kind = "loss"

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        loss = super().forward(x, target)
        return {"loss": loss, "tuple": (loss, x), "dict": {"loss": loss, "x": x}, "text": "nothing", "vector": x}[
            self.kind
        ]


def test_train_batch_takes_the_loss_from_any_output() -> None:
    _, losses, _ = plain(1)
    for kind in ("loss", "tuple", "dict"):
        torch.manual_seed(7)
        engine = engine_of(Losses(), config_of(gas=2))
        engine.module.kind = kind
        batches = iter([dict(zip(("x", "target"), part, strict=True)) for part in parts_of(0, engine)])
        assert engine.train_batch(batches).item() == pytest.approx(losses[0], rel=1e-6)
        assert engine.global_steps == 1
    for kind, said in (("text", "a str"), ("vector", r"a tensor of shape \(8, 12\)")):
        engine.module.kind = kind
        with pytest.raises(ConfigError, match=rf"Losses returned {said}.*Let its forward return"):
            engine.train_batch(iter(parts_of(0, engine)))


def test_train_batch_without_data() -> None:
    engine = engine_of(config=config_of(gas=2))
    with pytest.raises(ConfigError, match=r"train_batch\(\) has no data.*training_data="):
        engine.train_batch()
    with pytest.raises(ConfigError, match=r"eval_batch\(\) has no data"):
        engine.eval_batch()
    with pytest.raises(ConfigError, match=r"train_batch\(\) got a list.*iter\(…\)"):
        engine.train_batch(parts_of(0, engine))
    with pytest.raises(ConfigError, match=r"takes 2 micro-batches, and the iterator had 1 left"):
        engine.train_batch(iter(parts_of(0, engine)[:1]))


def check_eval() -> None:
    for stage in (1, 3):
        engine = engine_of(config=config_of(stage, gas=2))
        modes: list[bool] = []
        engine.module.register_forward_hook(lambda module, *_, seen=modes: seen.append(module.training))
        x, target = batch_of(3)
        wanted = make()(x, target).item()
        assert engine.eval_batch(iter(parts_of(3, engine))).item() == pytest.approx(wanted, rel=1e-6)
        assert modes == [False, False] and engine.module.training
        before = masters_of(engine)
        engine.set_dataloader(parts_of(0, engine))
        engine.train_batch()
        assert (masters_of(engine)["head.weight"] != before["head.weight"]).any()
        engine.set_dataiterator(iter(parts_of(3, engine)))
        assert engine.eval_batch(num_micro_batches=1).ndim == 0


def test_eval_batch(ranks: Any) -> None:
    ranks.run(check_eval, 2)


def test_what_a_scheduler_gets() -> None:
    engine = engine_of()
    assert engine.optimizer is not None
    engine.lr_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(engine.optimizer, patience=0, factor=0.5)
    for value in (1.0, 2.0, 3.0):
        ((x, target),) = parts_of(0, engine)
        engine.backward(engine(x, target))
        engine.step()  # without a metric a plateau is its owner's affair
        engine.backward(engine(x, target))
        engine.step(lr_kwargs={"metrics": value})
    assert engine.get_lr() == [LR / 4]


def test_what_backward_refuses() -> None:
    engine = engine_of()
    with pytest.raises(ConfigError, match=r"scalar loss, not one of shape \(2,\)"):
        engine.backward(torch.ones(2, requires_grad=True))
    with pytest.raises(ConfigError, match=r"not one of type float"):
        engine.backward(1.0)  # type: ignore[arg-type]
    bare = engine_of(config={"train_batch_size": 1})
    assert bare.optimizer is None and bare.get_lr() == []
    for call in (lambda: bare.backward(torch.ones(())), bare.step, bare.train_batch):
        with pytest.raises(ConfigError, match=r"without an optimizer: initialize\(\) got none"):
            call()
    assert bare(torch.ones(1, WIDTH)).shape == (1,)


def test_what_falls_through_to_the_module() -> None:
    engine = engine_of()
    assert engine.head is engine.module.head
    assert engine.eval() is engine and not engine.module.training
    assert engine.train() is engine and engine.module.training
    assert [n for n, _ in engine.named_parameters()] == [n for n, _ in make().named_parameters()]
    with pytest.raises(
        AttributeError, match=r"neither the engine nor its module \(Regressor\) has an attribute 'nothing'"
    ):
        _ = engine.nothing
    assert not math.isnan(engine.loss_scale)


def test_compile_and_destroy() -> None:
    engine = engine_of(nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))))
    before = engine(torch.ones(1, WIDTH))
    engine.compile(backend="eager", compile_kwargs={"dynamic": False})
    torch.testing.assert_close(engine(torch.ones(1, WIDTH)), before)
    engine.backward(engine(torch.ones(1, WIDTH)).sum())
    engine.step()
    after = engine(torch.ones(1, WIDTH))
    engine.destroy()
    for use in (engine.step, lambda: engine(torch.ones(1, WIDTH))):
        with pytest.raises(ConfigError, match=r"this engine was let go by engine.destroy\(\)"):
            use()
    torch.testing.assert_close(engine.module(torch.ones(1, WIDTH)), after)


def check_between_steps(stage: int) -> None:
    """An average over steps from a list made once, and a bound kept by hand, as plain torch has them."""
    real = zero_module.all_gather_slices
    reference, engine = make(), engine_of(config=config_of(stage))
    optimizer = torch.optim.AdamW(reference.parameters(), LR)
    lists = [list(model.parameters()) for model in (reference, engine.module)]
    averages = [[p.detach().clone() for p in kept] for kept in lists]
    with pytest.MonkeyPatch.context() as patch:  # gathers that complete only when waited for
        patch.setattr(zero_module, "all_gather_slices", lambda *given: Pending([], lambda: real(*given).wait()))
        for step in range(4):
            optimizer.zero_grad()
            reference(*batch_of(step)).backward()
            optimizer.step()
            train(engine, 1, first=step)
            with torch.no_grad():
                for kept, average in zip(lists, averages, strict=True):
                    for parameter, mean in zip(kept, average, strict=True):
                        parameter.clamp_(-0.25, 0.25)
                        mean.lerp_(parameter, 0.3)
    for mine, theirs in zip(averages[1], averages[0], strict=True):
        assert (mine - theirs).abs().max() < 2e-6
    assert_like(engine, reference)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_can_be_read_and_changed_after_a_step(ranks: Any, stage: int) -> None:
    ranks.run(check_between_steps, 2, stage)
