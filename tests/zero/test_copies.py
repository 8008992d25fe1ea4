"""Copied and pickled modules of an engine are ordinary ones: own parameters, equal weights, nothing of the engine."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megazero
from megazero.base.errors import ConfigError
from megazero.parallel.collectives import Pending
from megazero.parallel.topology import Topology
from megazero.zero import GatheredParameters
from megazero.zero import zero as zero_module
from megazero.zero.access import owner_of, safe_get_full_fp32_param
from megazero.zero.hooks import Hook, Idle
from tests.zero.test_stages import Blocks, Frozen, Tied, loss_of, make

KINDS = {"Blocks": Blocks, "Frozen": Frozen, "Tied": Tied}


def settings_of(stage: int, precision: str = "fp32") -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 3000},
    }


def by_torch(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": by_torch,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


def step(engine: Any, number: int) -> None:
    engine.backward(loss_of(engine, engine.topology.rank, 0, number))
    engine.step()


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_ordinary(made: nn.Module, module: nn.Module, weights: dict[str, Tensor]) -> None:
    held = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in module.named_parameters()]
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        assert owner_of(parameter) is None and getattr(parameter, "shard_spec", None) is None
        assert not parameter._post_accumulate_grad_hooks
        assert parameter.untyped_storage().data_ptr() not in held
    for part in made.modules():
        assert type(part._parameters) is dict
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_state_dict_hooks"):
            assert all(type(hook) is Idle for hook in getattr(part, kind).values())
        assert not any(isinstance(hook.hook, Hook) for hook in part._load_state_dict_pre_hooks.values())
    # it trains without the engine, whose gradients and weights stay as they are
    loss_of(made, 0, 0, 9).backward()
    assert all((p.grad is not None) == p.requires_grad for p in made.parameters())
    torch.optim.SGD(made.parameters(), lr=1.0).step()
    assert not torch.equal(made.norm.weight, weights["norm.weight"])
    made.load_state_dict(weights)
    assert torch.equal(made.state_dict()["norm.weight"], weights["norm.weight"])


def check_copies(kind: str, stage: int, precision: str = "fp32") -> None:
    engine = megazero.initialize(model=make(KINDS[kind]), config=settings_of(stage, precision))[0]
    module = engine.module
    for number, way in enumerate(WAYS):
        step(engine, number)
        made = WAYS[way](module)
        weights = whole(module)
        assert_ordinary(made, module, weights)
        assert all(torch.equal(value, weights[name]) for name, value in whole(module).items())
    again = megazero.initialize(model=made, config=settings_of(2))[0]  # a copy may have an engine of its own
    step(again, 5)
    assert not torch.equal(whole(again.module)["norm.weight"].float(), weights["norm.weight"].float())
    assert torch.equal(whole(module)["norm.weight"], weights["norm.weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_copies_are_ordinary(ranks: Any, kind: str, stage: int) -> None:
    ranks.run(check_copies, 1, kind, stage)
    ranks.run(check_copies, 2, kind, stage)


@pytest.mark.parametrize("stage", [0, 1])
def test_copies_of_16_bit_weights(ranks: Any, stage: int) -> None:
    ranks.run(check_copies, 2, "Blocks", stage, "bf16")


def check_late(stage: int) -> None:
    """Weights that arrive only when waited for have arrived in the copy."""
    engine = megazero.initialize(model=make(Blocks), config=settings_of(stage))[0]
    real = zero_module.all_gather_slices
    for number, way in enumerate(WAYS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zero_module, "all_gather_slices", lambda *given: Pending([], lambda: real(*given).wait()))
            step(engine, number)
            made = WAYS[way](engine.module)
            for parameter, copied in zip(engine.module.parameters(), made.parameters(), strict=True):
                assert torch.equal(safe_get_full_fp32_param(parameter), copied)


@pytest.mark.parametrize("stage", [1, 2])
def test_copies_wait_for_what_is_on_its_way(ranks: Any, stage: int) -> None:
    ranks.run(check_late, 2, stage)


def check_stage_3(kind: str) -> None:
    engine = megazero.initialize(model=make(KINDS[kind]), config=settings_of(3))[0]
    module = engine.module
    step(engine, 0)
    for way in WAYS.values():
        with pytest.raises(
            ConfigError, match=r"stage 3 cannot be copied or pickled.*GatheredParameters\(list\(module.p"
        ):
            way(module)
    for way in WAYS.values():
        with GatheredParameters(list(module.parameters())):
            made = way(module)
        assert_ordinary(made, module, whole(module))
    step(engine, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_3_is_copied_whole_or_not(ranks: Any, kind: str) -> None:
    ranks.run(check_stage_3, 2, kind)


def check_topology() -> None:
    topology = Topology.build(dp=2, device_type="cpu")
    holder = nn.Linear(2, 2)
    holder.topology, holder.group = topology, topology.group("zero")
    made = copy.deepcopy(holder)
    assert made.topology is topology and made.group is topology.group("zero") and made.weight is not holder.weight


def test_layers_that_know_their_ranks_are_copied(ranks: Any) -> None:
    ranks.run(check_topology, 2)
