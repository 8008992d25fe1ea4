"""The optimizer over shards: groups, SGD, states that come and go, and ranks that own padding only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megazero.config.schema import OptimizerConfig
from megazero.engine.optimizer import ShardOptimizer, decays_weight
from megazero.parallel.topology import Topology
from megazero.zero.zero import Zero
from tests.engine.toys import LR, assert_weights, decay_groups, engine_of, global_batch, loss_sum, make_toy, run_step


def check_sgd(momentum: float) -> None:
    """torch's SGD: momentum, and weight decay added to the gradient of matrices."""
    engine = engine_of(optimizer="sgd", sgd_momentum=momentum, weight_decay=0.1)
    plain = make_toy()
    optimizer = torch.optim.SGD(decay_groups(plain, 0.1), lr=LR, momentum=momentum)
    for step in range(4):
        run_step(engine, step)
        batch = global_batch(step)
        optimizer.zero_grad()
        (loss_sum(plain, batch) / batch[2].sum()).backward()
        optimizer.step()
        assert_weights(engine, plain)
    assert engine.optimizer.state_keys() == (["momentum_buffer"] if momentum else [])
    assert engine.optimizer.scalars() == {}


@pytest.mark.parametrize("size", [1, 2])
def test_sgd(ranks: Any, size: int) -> None:
    ranks.run(check_sgd, size, 0.9)
    ranks.run(check_sgd, size, 0.0)


def test_weight_decay_is_for_matrices() -> None:
    engine = engine_of(weight_decay=0.25)
    assert engine.optimizer.optimizer is not None
    groups = {
        group["weight_decay"]: sum(p.numel() for p in group["params"])
        for group in engine.optimizer.optimizer.param_groups
    }
    sizes = [sum(p.numel() for p in make_toy().parameters() if (p.dim() > 1) is matrix) for matrix in (True, False)]
    assert groups == {0.25: sizes[0], 0.0: sizes[1]}
    decided = {place.name: decays_weight(place) for bucket in engine.zero.buckets for place in bucket.placed}
    assert decided["head.weight"] and not decided["head.bias"] and not decided["norm.weight"]


def test_settings_reach_torch() -> None:
    optimizer = engine_of(adam_beta1=0.5, adam_beta2=0.6, adam_eps=0.1).optimizer.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.5, 0.6), 0.1, True)


def test_states_appear_with_the_first_step() -> None:
    engine = engine_of()
    assert engine.optimizer.state_keys() == [] and engine.optimizer.scalars() == {}
    run_step(engine, 0)
    run_step(engine, 1)
    assert engine.optimizer.state_keys() == ["exp_avg", "exp_avg_sq"]
    assert engine.optimizer.scalars() == {"step": 2.0}
    held = sum(buffer.numel() for _, _, buffer in engine.optimizer.buffers("exp_avg"))
    assert held == sum(p.numel() for p in make_toy().parameters())


def test_prepared_states_are_those_that_the_next_step_uses() -> None:
    one, other = engine_of(), engine_of()
    for step in range(2):
        run_step(one, step)
    other.optimizer.prepare(one.optimizer.state_keys(), one.optimizer.scalars())
    for key in one.optimizer.state_keys():
        for (_, _, source), (_, _, target) in zip(
            one.optimizer.buffers(key), other.optimizer.buffers(key), strict=True
        ):
            assert not target.any()
            target.copy_(source)
    for (_, _, source), (_, _, target) in zip(one.zero.masters(), other.zero.masters(), strict=True):
        target.copy_(source)
    other.loaded()
    run_step(one, 2)
    run_step(other, 2)
    for (_, _, a), (_, _, b) in zip(one.zero.masters(), other.zero.masters(), strict=True):
        assert torch.equal(a, b)


def check_padding_only() -> None:
    """Ten elements on two ranks: the second owns none of them, and follows all the same."""
    topology = Topology.build()
    model = nn.Linear(4, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    settings: dict[str, Any] = {"stage": 1, "dtype": torch.float32, "device": torch.device("cpu"), "units": []}
    zero = Zero(model, topology, initial=lambda place: torch.zeros(0), **settings)
    optimizer = ShardOptimizer(zero, OptimizerConfig(lr=0.1, weight_decay=0.0))
    assert [bool(group["params"]) for group in optimizer.optimizer.param_groups] == [topology.rank == 0] * 2
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        zero.finish_reduction()
        optimizer.step(1.0)
        zero.wait_parameters()
    torch.testing.assert_close(model.weight, torch.full((2, 4), 0.8))
    assert optimizer.state_keys() == ([] if topology.rank else ["exp_avg", "exp_avg_sq"])
    optimizer.prepare(["exp_avg", "exp_avg_sq"], {"step": 1.0})
    assert len(optimizer.buffers("exp_avg")) == (0 if topology.rank else 2)


def test_a_rank_may_own_padding_only(ranks: Any) -> None:
    ranks.run(check_padding_only, 2)
