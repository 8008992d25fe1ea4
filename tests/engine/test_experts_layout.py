"""Spread experts: what does not fit is refused, what ranks hold and send, and what a script asks of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import megazero
from megazero.base.errors import ConfigError
from megazero.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megazero.engine.experts import expert_parallel_size
from megazero.engine.introspection import state_bytes
from megazero.models.moe_layer import MoE, split_params_into_different_moe_groups_for_optimizer
from megazero.parallel.collectives import gather_objects
from megazero.parallel.traffic import Count
from megazero.zero.access import safe_get_full_optimizer_state, safe_set_full_fp32_param
from megazero.zero.context import GatheredParameters
from tests.engine.moe import (
    EXPERTS,
    LENGTH,
    LR,
    SAMPLES,
    WIDTH,
    Model,
    assert_alike,
    config_of,
    engine_of,
    fill,
    plain,
    spread,
    train,
    weights_of,
)
from tests.harness import Ranks


@pytest.mark.parametrize(
    ("model", "configured", "ranks", "axes", "said"),
    [
        (lambda: Model(4), 2, 4, [], r"ep_size=4 \(blocks\.0\.moe\..*\) and moe\.ep_size 2 in the conf.*make them"),
        (lambda: Model(3), 1, 3, [], r"ep_size=3 with num_experts=4: .* out of 1, 2, 4\."),
        (lambda: Model(1), 3, 3, [], r"ep_size=3 with 4 experts \(blocks\.0.*\): .*Use an ep_size that divides 4"),
        (lambda: Model(4), 1, 6, [], r"ep_size=4 with 6 ranks: .*Use an ep_size out of 1, 2, 3, 6, or a multiple of 4"),
        (lambda: Model(2), 1, 1, [], r"ep_size=2 with 1 rank: .*Use an ep_size out of 1, or"),
        (lambda: nn.Sequential(Model(2), Model(4)), 1, 4, [], r"ep_size=2 \(0\..*\), ep_size=4 \(1\..*\): .*one"),
        (lambda: nn.Linear(2, 2), 4, 4, [], r"moe\.ep_size 4 .*the model has no experts.*Leave it out, or build"),
        (lambda: Model(2), 1, 4, ["tp_size=2"], r"ep_size=2 with tp_size=2: .*data-parallel ranks only\. Use one"),
        (lambda: Model(1), 2, 4, ["an mpu"], r"ep_size=2 with an mpu: "),
    ],
)  # fmt: skip
def test_what_does_not_fit(model: Any, configured: int, ranks: int, axes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        expert_parallel_size(model(), configured, ranks, axes)


def test_the_layer_or_the_configuration_says_it() -> None:
    assert expert_parallel_size(Model(2), 1, 4, []) == expert_parallel_size(Model(1), 2, 4, []) == 2
    assert expert_parallel_size(Model(2), 2, 2, []) == 2
    assert expert_parallel_size(Model(1), 1, 3, ["tp_size=2"]) == expert_parallel_size(nn.Linear(2, 2), 0, 3, []) == 1


def test_a_script_without_ranks_or_initialize() -> None:
    with pytest.raises(ConfigError, match=r"ep_size=2 with 1 rank"):
        engine_of(Model(2), config_of(1))
    with pytest.raises(ConfigError, match=r"ep_size=4 with 1 rank"):
        engine_of(Model(1), config_of(1, moe_expert_parallel_size=4))
    with pytest.raises(ConfigError, match=r"holds 2 of its 4 experts.*megazero\.initialize\(\) .*or build it with ep_"):
        Model(2)(torch.randn(1, 2, WIDTH), torch.randn(1, 2))


def check_refusals() -> None:
    tied = Model(1)
    experts = tied.blocks[0].moe.deepspeed_moe.experts.deepspeed_experts
    experts[3].up.weight = experts[0].up.weight
    with pytest.raises(ConfigError, match=r"1 parameters of blocks\.0\..* stand in several experts.*Untie it"):
        engine_of(tied, config_of(1, moe={"ep_size": 2}))
    outside = Model(2)
    outside.blocks[0].mix.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    outside.blocks[1].moe.deepspeed_moe.experts.deepspeed_experts[1].more = outside.blocks[0].mix
    with pytest.raises(ConfigError, match=r"2 parameters of blocks\.1\..*or outside them"):
        engine_of(outside, config_of(1))
    layers = [nn.Linear(2, 2), MoE(2, nn.Linear(2, 2), 2, 2)]
    pipeline = megazero.PipelineModule(layers=layers, loss_fn=nn.MSELoss(), num_stages=1)
    with pytest.raises(ConfigError, match=r"ep_size=2 with a PipelineModule"):
        engine_of(pipeline, config_of(1))
    with pytest.raises(ConfigError, match=r"ep_size=2 with tp_size=2"):
        engine_of(Model(2), config_of(1, tensor_parallel={"autotp_size": 2}))
    with pytest.raises(ConfigError, match=r"ep_size=2 with an mpu"):
        engine_of(Model(2), config_of(1), mpu=object())


def test_refusals_of_initialize(ranks: Ranks) -> None:
    ranks.run(check_refusals, 2)


def check_run_config() -> None:
    training = TrainingConfig(precision="fp32", micro_batch_size=SAMPLES // 4, global_batch_size=SAMPLES)
    config = RunConfig(training=training, parallel=ParallelConfig(zero_stage=2, expert_model_parallel_size=2))
    model = fill(Model(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-4)
    assert_alike(train(megazero.initialize(model=model, optimizer=optimizer, config=config)[0]), plain(4, clip=1.0))


def test_a_run_config(ranks: Ranks) -> None:
    ranks.run(check_run_config, 4)


def check_mixed() -> None:
    """Layers of ep_size 1 beside others keep all their experts, unless the configuration says a size."""
    for moe, held in (({}, EXPERTS), ({"moe": {"ep_size": 2}}, 2)):
        model = Model(2)
        model.blocks[1] = Model(1).blocks[1]
        engine = engine_of(fill(model), config_of(2, **moe))
        lists = [block.moe.deepspeed_moe.experts.deepspeed_experts for block in engine.module.blocks]
        assert [len(each) for each in lists] == [2, held]
        groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters())})
        assert [g["name"] for g in groups[1:]] == (["ep_size_1", "ep_size_2"] if held == EXPERTS else ["ep_size_2"])
        train(engine, 1)


def test_layers_with_and_without(ranks: Ranks) -> None:
    ranks.run(check_mixed, 2)


# what ranks hold and send


class Wide(nn.Module):
    """Nearly all of it is experts."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.moe = MoE(64, nn.Linear(64, 64), 8, ep_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x)[0].square().mean()


def check_bytes(stage: int) -> list[int]:
    """Of weights, gradients, masters and moments, for each ep."""
    found = []
    for ep in (1, 2, 4):
        engine = engine_of(Wide(ep), config_of(stage))
        engine.backward(engine(torch.randn(4, 64)))
        engine.step()
        assert sum(p.numel() for n, p in engine.module.named_parameters() if "experts" in n) == 8 // ep * 65 * 64
        found.append(sum(state_bytes(engine.module, engine.zero, engine.shards).values()))
    return found


def test_bytes_fall_with_the_ranks(ranks: Ranks) -> None:
    """Stage 0 holds a share of the experts whole; stage 3 shards of all, or of its own among fewer ranks."""
    for whole, half, quarter in ranks.run(check_bytes, 4, 0):
        assert whole / half == pytest.approx(2, rel=0.05) and whole / quarter == pytest.approx(4, rel=0.1)
    for whole, half, quarter in ranks.run(check_bytes, 4, 1):  # weights and gradients fall, moments are shards
        assert whole / half == pytest.approx((8 + 8 / 4) / (8 / 2 + 8 / 4), rel=0.05)
        assert whole / quarter == pytest.approx((8 + 8 / 4) / (8 / 4 + 8 / 4), rel=0.05)
    for whole, half, quarter in ranks.run(check_bytes, 4, 3):
        assert half / whole == pytest.approx(1, rel=0.05) and quarter / whole == pytest.approx(1, rel=0.05)


def check_traffic(ep: int, stage: int) -> None:
    engine = engine_of(spread(ep, dist.get_rank()), config_of(stage))
    train(engine, 1)
    before = engine.topology.traffic.totals()
    x, target = torch.randn(4, LENGTH, WIDTH), torch.randn(4, LENGTH)
    engine.backward(engine(x, target))
    engine.step()
    sent = engine.topology.traffic.since(before)
    copies, total = 4 // ep, sum(p.numel() for n, p in Model(1).named_parameters() if "experts" in n)
    dense = sum(p.numel() for p in Model(1).parameters()) - total

    def volume(axis: str, operation: str) -> float:
        return sent.get((axis, operation), Count()).bytes / 4  # elements

    of_copies = (total / ep) * (copies - 1) / copies
    gathers = 2 if stage == 3 else 1
    assert volume("expert_dp", "reduce-scatter") == pytest.approx(of_copies)
    assert volume("expert_dp", "all-gather") == pytest.approx(gathers * of_copies)
    assert volume("zero", "reduce-scatter") == pytest.approx(dense * 3 / 4)
    assert sent["ep", "all-to-all"].calls == 2 * 4 and sent["ep", "scalars"].calls == 2  # there and back, and gradients
    rooms = volume("ep", "all-to-all") / (4 * EXPERTS * WIDTH * (ep - 1) / ep)  # the layers' rooms together
    assert rooms == pytest.approx(round(rooms)) and 2 * (4 * LENGTH * 2 / EXPERTS) <= rooms <= 2 * 4 * LENGTH


@pytest.mark.parametrize(("ep", "stage"), [(2, 2), (2, 3), (4, 2)])
def test_what_is_sent(ranks: Ranks, ep: int, stage: int) -> None:
    ranks.run(check_traffic, 4, ep, stage)


# what a script asks


def check_access(stage: int) -> None:
    engine = engine_of(spread(2, dist.get_rank()), config_of(stage))
    train(engine, 1)
    world = engine.topology.group("world")
    experts = engine.module.blocks[1].moe.deepspeed_moe.experts.deepspeed_experts
    number = experts.numbers[1]
    name = f"blocks.1.moe.deepspeed_moe.experts.deepspeed_experts.{number}.down.bias"
    parameter = experts[number].down.bias
    moment = safe_get_full_optimizer_state(parameter, "exp_avg")
    assert moment is not None and len({float(m.sum()) for m in gather_objects(moment, world)}) == 2
    safe_set_full_fp32_param(parameter, torch.full((WIDTH,), float(number)))
    with GatheredParameters(experts[number].up.bias, modifier_rank=engine.topology.group("expert_dp").ranks[1]):
        experts[number].up.bias.data.fill_(world.rank)
    for rank, named in enumerate(gather_objects(name, world)):
        found = weights_of(engine)
        assert (found[named] == int(named.split(".")[-3])).all()
        assert (found[named.replace("down", "up")] == rank % 2 + 2).all()
    other = (engine.global_rank + 1) % 4
    with pytest.raises(ValueError, match=f"modifier_rank {other} does not hold these parameters.*{engine.global_rank}"):
        GatheredParameters(parameter, modifier_rank=other).__enter__()
    with GatheredParameters(list(engine.module.parameters())):
        assert not any(p.isnan().any() for p in engine.module.parameters())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_whole_tensors_of_experts(ranks: Ranks, stage: int) -> None:
    ranks.run(check_access, 4, stage)


def check_nonfinite(stage: int) -> str:
    """Ranks 0 and 1 make bad gradients of different experts, which are in the same bucket."""
    engine = engine_of(spread(2, dist.get_rank()), config_of(stage))
    experts = engine.module.blocks[0].moe.deepspeed_moe.experts.deepspeed_experts
    if engine.global_rank < 2:
        experts[experts.numbers[0]].down.bias.register_hook(lambda gradient: gradient * torch.nan)
    engine.backward(engine(torch.randn(4, LENGTH, WIDTH), torch.randn(4, LENGTH)))
    engine.step()
    assert engine.last is not None and engine.last.skipped and engine.last.warning is not None
    return engine.last.warning


@pytest.mark.parametrize("stage", [0, 2])
def test_gradients_that_are_not_finite_are_of_the_right_experts(ranks: Ranks, stage: int) -> None:
    name = "gradient of blocks.0.moe.deepspeed_moe.experts.deepspeed_experts"
    warning = ranks.run(check_nonfinite, 4, stage)[0]
    assert warning.endswith(f"; rank 0: {name}.0.down.bias; rank 1: {name}.2.down.bias")
