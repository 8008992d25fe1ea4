"""The pipeline itself: every schedule's gradients, evaluation, what it calls and what it says when a stage fails."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero import LayerSpec, PipelineModule, Topology
from megazero.config.pipeline import SPLIT_BACKWARD_SCHEDULES, place_of
from megazero.config.schema import OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megazero.engine.engine import Engine
from megazero.parallel.pipeline import MULTI, SINGLE, LocalStage, Pipeline
from tests.harness import RankFailure

WIDTH, ROWS, MICRO_BATCHES = 4, 2, 4
SCHEDULES = (*SINGLE, *MULTI)


def stage_module(number: int) -> nn.Linear:
    """A stage that is the same wherever it is built."""
    torch.manual_seed(number)
    return nn.Linear(WIDTH, WIDTH)


def batches(length: int = 3) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(length)
    return [
        {"x": torch.randn(ROWS, length, WIDTH, generator=draw), "weight": torch.full((ROWS, 1, 1), float(index))}
        for index in range(MICRO_BATCHES)
    ]


def run_stage(last: int, stages: dict[nn.Module, int], stage: nn.Module, inputs: Any, hidden: Any) -> Tensor:
    """tanh of the layer; the last stage weighs the result by a tensor that came beside it, not through the stages."""
    out = torch.tanh(stage(inputs["x"] if hidden is None else hidden))
    if stages[stage] < last:
        return out
    return (out * inputs["weight"]).sum() if "weight" in inputs else out


def received(inputs: Any, stage: int) -> tuple[Tensor, ...]:
    return (torch.empty(inputs["x"].shape, device="meta", requires_grad=True),)


def pipeline(schedule: str, done: Any = lambda stage: None, wrap: Any = lambda stage: stage) -> Pipeline:
    topology = Topology.build(pp=torch.distributed.get_world_size())
    group = topology.group("pp")
    count = group.size * (1 if schedule in SINGLE else 2)
    places = [place_of(stage, group.size, schedule).rank for stage in range(count)]
    mine = [LocalStage(n, wrap(stage_module(n))) for n, place in enumerate(places) if place == group.rank]
    return Pipeline(
        mine,
        places,
        group,
        schedule=schedule,
        micro_batches=MICRO_BATCHES,
        example=batches()[0],
        received=received,
        forward=partial(run_stage, count - 1, {stage.module: stage.number for stage in mine}),
        weights_done=done,
        device=torch.device("cpu"),
    )


def alone(stages: int, length: int = 3) -> tuple[list[nn.Linear], list[Tensor], list[Tensor]]:
    """All stages in one process, and what comes out: losses and hidden results."""
    modules = [stage_module(number) for number in range(stages)]
    losses, results = [], []
    for batch in batches(length):
        x = batch["x"]
        for module in modules:
            x = torch.tanh(module(x))
        results.append(x)
        losses.append((x * batch["weight"]).sum())
    return modules, losses, results


def check_training(schedule: str) -> tuple[float, int]:
    """Gradients are those of sum / denominator; the total comes back undivided, on the last stage's rank."""
    calls: list[nn.Module] = []
    pipe = pipeline(schedule, calls.append)
    modules, losses, _ = alone(len(pipe.places))
    (sum(losses) / 7.0).backward()
    for _ in range(2):  # shapes are fixed by the first step; nothing of it is left in the second
        for stage in pipe.stages:
            stage.module.zero_grad()
        total = pipe.train(batches(), torch.tensor(7.0))
        for stage in pipe.stages:
            for name, parameter in stage.module.named_parameters():
                wanted = modules[stage.number].get_parameter(name).grad
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-6, msg=f"{stage.number} {name}")
    wanted = float(sum(losses)) if pipe.has_last else 0.0
    assert float(total) == pytest.approx(wanted, rel=1e-5)
    return float(pipe.from_last(total.clone())), len(calls)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training(ranks: Any, schedule: str) -> None:
    (first, calls), (second, others) = ranks.run(check_training, 2, schedule)
    assert first == second != 0.0
    expected = 2 * 2 * MICRO_BATCHES if schedule in SPLIT_BACKWARD_SCHEDULES else 0  # steps, stages
    assert 0 < calls <= expected if expected else calls == 0
    assert 0 < others <= expected if expected else others == 0


def check_evaluation(schedule: str) -> int:
    """Several micro-batches, of another length than in training, without labels and with."""
    pipe = pipeline(schedule)
    stages = len(pipe.places)
    _, losses, results = alone(stages, length=5)
    for _ in range(2):
        found = pipe.forward([{"x": batch["x"]} for batch in batches(5)])
        assert len(found) == (MICRO_BATCHES if pipe.has_last else 0)
        for mine, wanted in zip(found, results, strict=False):
            torch.testing.assert_close(mine, wanted.detach(), rtol=1e-5, atol=1e-6)
        assert not any(result.requires_grad for result in found)
        pipe.train(batches(), torch.tensor(1.0))
    total = torch.zeros(())
    for loss in pipe.forward(batches(5)):
        total += loss
    assert float(pipe.from_last(total)) == pytest.approx(float(sum(losses)), rel=1e-5)
    return len(found)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zbv"])
def test_evaluation(ranks: Any, schedule: str) -> None:
    assert sorted(ranks.run(check_evaluation, 2, schedule)) == [0, MICRO_BATCHES]


def gradients_in_bf16(stages: int, schedule: str, micro_batches: int) -> dict[str, Tensor]:
    """A bf16 model's reduced gradients, as the optimizer sees them."""
    torch.manual_seed(1)
    layers = [LayerSpec(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(4)]
    module = PipelineModule(layers, stages, loss_fn=lambda out, label: (out * label).sum(), schedule=schedule)
    config = RunConfig(
        training=TrainingConfig(precision="bf16"),
        parallel=ParallelConfig(zero_stage=0),
        optimizer=OptimizerConfig(clip_grad=0.0),
    )
    engine = Engine(module, module.topology, config, torch.device("cpu"), module.units)
    draw = torch.Generator().manual_seed(2)
    data = [torch.rand(1, WIDTH, generator=draw).bfloat16() for _ in range(micro_batches)]
    step = [module.micro_batch(x, torch.ones(1, 1, dtype=torch.bfloat16)) for x in data]
    if stages > 1:
        make = partial(module.pipeline, micro_batches=micro_batches, example=step[0], device=torch.device("cpu"))
        engine.use_pipeline(partial(make, dtype=torch.bfloat16))
    engine.train_step(step, PipelineModule.loss, 1.0, lr=0.0)
    assert all(bucket.grads.dtype == torch.float32 for bucket in engine.zero.buckets)
    return {p.spec.name: b.grads[p.start : p.stop].clone() for b in engine.zero.buckets for p in b.placed}


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-zero-bubble", "zbv", "dualpipev"])
def test_gradients_of_bf16_models_add_up_in_fp32(ranks: Any, schedule: str) -> None:
    """256 gradients of about one size, whose sum in bf16 falls behind."""
    found: dict[str, Tensor] = {}
    for part in ranks.run(gradients_in_bf16, 2, 2, schedule, 256):
        found |= part
    wanted = gradients_in_bf16(1, schedule, 256)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    each = torch.full((256,), 0.731).bfloat16()
    one_by_one = torch.zeros((), dtype=torch.bfloat16)
    for value in each:
        one_by_one += value
    assert float(one_by_one) != pytest.approx(float(each.float().sum()), rel=0.05), "a sum in bf16 would be seen"


class Failing(nn.Module):
    """A stage that fails, or dies, in forward or backward of its third micro-batch."""

    def __init__(self, inner: nn.Module, where: str) -> None:
        super().__init__()
        self.inner, self.where, self.calls = inner, where, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.where == "backward":
            out = _FailsInBackward.apply(out, self)
        else:
            self.count()
        return out

    def count(self) -> None:
        self.calls += 1
        if self.calls == 3 and self.where == "death":
            os._exit(3)
        if self.calls == 3:
            raise ArithmeticError("the coffee is cold")


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Failing) -> Tensor:
        ctx.stage = stage
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.stage.count()
        return gradient, None


def fail(schedule: str, where: str) -> None:
    pipe = pipeline(schedule, wrap=lambda stage: Failing(stage, where) if torch.distributed.get_rank() == 1 else stage)
    pipe.train(batches(), torch.tensor(1.0))


@pytest.mark.parametrize(("schedule", "where"), [("gpipe", "forward"), ("1f1b", "backward"), ("zbv", "backward")])
def test_an_error_in_a_stage_says_where(ranks: Any, schedule: str, where: str) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(fail, 2, schedule, where, timeout=30)
    said = str(caught.value)
    assert "rank 1 failed" in said
    assert "the coffee is cold" in said
    place = r"micro-batch \d in stage [12]" if schedule == "zbv" else "micro-batch 2 in stage 1"
    assert re.search(f"pipeline: rank 1 in the {where} of {place}; it works with stage 0 on rank 0", said)


@pytest.mark.parametrize("schedule", ["gpipe", "zbv"])
def test_a_rank_that_loses_another_says_where_it_was(ranks: Any, schedule: str) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(fail, 2, schedule, "death", timeout=30)
    said = str(caught.value)
    assert "rank 1 exited with code 3" in said
    assert "rank 0 failed" in said, "it does not hang"
    assert re.search(r"pipeline: rank 0 after the \w+ of micro-batch \d in stage [03]; it works with stage 1 on", said)
