"""Whole tensors at every stage: GatheredParameters, safe_get/set, state dicts; and Init, which builds in slices."""

from __future__ import annotations

import gc
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.parallel.topology import Topology
from megazero.zero import GatheredParameters, Init, register_external_parameter, safe_get_full_fp32_param
from megazero.zero import init as init_module
from megazero.zero.access import (
    register,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from megazero.zero.state_dict import register_hooks
from megazero.zero.zero import Zero
from tests.zero.test_stages import Blocks, loss_of, make

CPU = torch.device("cpu")


def build(stage: int, dtype: torch.dtype = torch.float32, model: nn.Module | None = None) -> tuple[Blocks, Zero]:
    model = model or make(Blocks)
    model.blocks[0].up.weight.requires_grad_(False)
    zero = Zero(
        model,
        Topology.build(),
        stage=stage,
        dtype=dtype,
        device=CPU,
        initial=lambda place: torch.zeros(0),
        units=[f"blocks.{i}" for i in range(3)],
    )
    register_hooks(zero)
    return model, zero  # type: ignore[return-value]


def no_states(bucket: Any, key: str) -> list[tuple[int, Tensor]]:
    return []


def check_state_dict(stage: int) -> None:
    source = make(Blocks)
    for dtype in (torch.float32, torch.bfloat16):
        model, zero = build(stage, dtype)
        saved = model.state_dict()
        assert {k: tuple(v.shape) for k, v in saved.items()} == {
            k: tuple(v.shape) for k, v in source.state_dict().items()
        }
        for name, value in source.state_dict().items():
            assert torch.equal(saved[name], value.to(dtype)), name
        part = model.blocks[1].state_dict()
        assert torch.equal(part["up.bias"], source.blocks[1].up.bias.to(dtype))
        wanted = {name: value * 1.001 + 0.1 for name, value in source.state_dict().items()}
        assert not (set(model.load_state_dict(wanted).missing_keys))
        for name, value in model.state_dict().items():
            assert torch.equal(value, wanted[name].to(dtype)), name
        register(zero, no_states)
        for name, p in model.named_parameters():
            if p.requires_grad:  # the master comes from what was given, before the cast
                assert torch.equal(safe_get_full_fp32_param(p), wanted[name]), name
        zero.publish()  # what the next step starts from
        for name, value in model.state_dict().items():
            assert torch.equal(value, wanted[name].to(dtype)), name
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict({**wanted, "norm.weight": torch.zeros(3)})
        if zero.gatherer is not None:
            assert not zero.gatherer._live and not zero.gatherer._pinned


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_dicts_are_plain_ones(ranks: Any, stage: int) -> None:
    ranks.run(check_state_dict, 2, stage)


def check_gathered(stage: int) -> None:
    rank = dist.get_rank()
    model, zero = build(stage, torch.bfloat16)
    register(zero, no_states)
    wanted = make(Blocks).to(torch.bfloat16)
    weight, frozen = model.blocks[1].down.weight, model.blocks[0].up.weight
    with GatheredParameters([weight, frozen]):
        assert torch.equal(weight, wanted.blocks[1].down.weight)
        assert torch.equal(frozen, wanted.blocks[0].up.weight)
        with GatheredParameters(weight):  # inside another
            assert float(weight.float().norm()) > 0
        assert torch.equal(weight, wanted.blocks[1].down.weight)
    with GatheredParameters(model.parameters()):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    with GatheredParameters([weight, frozen], modifier_rank=1), torch.no_grad():
        weight.fill_(3.0 + rank)
        frozen.fill_(5.0 + rank)
    with GatheredParameters(model.parameters()):
        assert (weight == 4.0).all() and (frozen == 6.0).all()
    assert (safe_get_full_fp32_param(weight) == 4.0).all() and safe_get_full_fp32_param(frozen) is None
    with pytest.raises(ValueError, match="modifier_rank=0"), GatheredParameters(weight), torch.no_grad():
        weight.add_(1.0)
    with (
        pytest.raises(ValueError, match="modifier_rank 7 does not hold these parameters: choose one of the ranks 0, 1"),
        GatheredParameters(weight, modifier_rank=7),
    ):
        pass
    with GatheredParameters(weight, enabled=False):
        assert bool(weight.isnan().all()) == (stage == 3)
    if stage == 3:
        with pytest.raises(RuntimeError), torch.no_grad():
            weight.add_(1.0)  # a sharded parameter cannot be written


@pytest.mark.parametrize("stage", [1, 3])
def test_gathered_parameters(ranks: Any, stage: int) -> None:
    ranks.run(check_gathered, 2, stage)


def check_unchanged(stage: int) -> None:
    """Masters have digits that 16-bit weights have not: only changed elements lose them."""
    model, zero = build(stage, torch.bfloat16)
    register(zero, no_states)
    weight = model.blocks[1].down.weight
    before = {name: safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
    assert (before["blocks.1.down.weight"] != before["blocks.1.down.weight"].bfloat16()).any()
    with GatheredParameters(model.parameters(), modifier_rank=1), torch.no_grad():
        weight[0, :2] = 3.0
    wanted = {name: None if value is None else value.clone() for name, value in before.items()}
    wanted["blocks.1.down.weight"][0, :2] = 3.0
    for name, parameter in model.named_parameters():
        found = safe_get_full_fp32_param(parameter)
        assert found is wanted[name] is None or torch.equal(found, wanted[name])
    with GatheredParameters(weight):
        assert torch.equal(weight, wanted["blocks.1.down.weight"].bfloat16())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_elements_that_a_modifier_leaves_alone_keep_their_masters(ranks: Any, stage: int) -> None:
    ranks.run(check_unchanged, 2, stage)


def check_safe(stage: int) -> None:
    model, zero = build(stage)
    moments = {id(b): torch.full_like(b.master, 0.5) for b in zero.buckets}
    owner = register(zero, lambda b, key: [(b.owned[0], moments[id(b)])] if key == "exp_avg" else [])
    owner.factor = lambda: 0.25
    plain = make(Blocks)
    plain.blocks[0].up.weight.requires_grad_(False)
    for rank in range(2):
        loss_of(plain, rank, 0, 0).backward()
    loss_of(model, dist.get_rank(), 0, 0).backward()
    wanted = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(safe_get_full_grad(p), wanted[name].grad * 0.25, rtol=1e-4, atol=1e-6)
            assert torch.equal(safe_get_full_fp32_param(p), wanted[name])
            assert (safe_get_full_optimizer_state(p, "exp_avg") == 0.5).all()
            assert safe_get_full_optimizer_state(p, "nothing") is None
        else:
            assert safe_get_full_grad(p) is None and safe_get_full_optimizer_state(p, "exp_avg") is None
    weight = model.blocks[2].up.weight
    value = torch.arange(float(weight.numel())).view(weight.shape)
    safe_set_full_fp32_param(weight, value)
    safe_set_full_grad(weight, value + 1)
    safe_set_full_optimizer_state(weight, value + 2, "exp_avg")
    assert torch.equal(safe_get_full_fp32_param(weight), value)
    torch.testing.assert_close(safe_get_full_grad(weight), value + 1)
    assert torch.equal(safe_get_full_optimizer_state(weight, "exp_avg"), value + 2)
    assert (safe_get_full_optimizer_state(model.head.weight, "exp_avg") == 0.5).all()
    with GatheredParameters(weight):
        assert torch.equal(weight, value)
    zero.finish_reduction()  # the step's own: nothing is left to do, and the change stays
    torch.testing.assert_close(safe_get_full_grad(weight), value + 1)
    with pytest.raises(ValueError, match="give the whole tensor"):
        safe_set_full_fp32_param(weight, value[:2])
    with pytest.raises(ValueError, match="no optimizer state 'nothing'"):
        safe_set_full_optimizer_state(weight, value, "nothing")
    with pytest.raises(ConfigError, match="not trained by an engine"):
        safe_set_full_grad(model.blocks[0].up.weight, value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_safe_access(ranks: Any, stage: int) -> None:
    ranks.run(check_safe, 2, stage)


def test_external_parameters_are_noticed_by_themselves() -> None:
    register_external_parameter(nn.Linear(2, 2), nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"takes an nn\.Parameter, got str"):
        register_external_parameter(nn.Linear(2, 2), "weight")


class Wide(nn.Module):
    """Initialises its parameters after they were registered, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.tied = nn.Linear(64, 64, bias=False)
        self.tied.weight = self.layers[0].weight
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.02)
            with torch.no_grad():
                layer.bias.zero_()
                layer.bias[1] = 7.0


def check_init(monkeypatched: int) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(8)
    wanted = Wide()
    torch.manual_seed(8 + rank)  # rank 0's values count
    before, init_module.LIVE_ELEMENTS = init_module.LIVE_ELEMENTS, monkeypatched
    try:
        with Init(), Init():
            model = Wide()
    finally:
        init_module.LIVE_ELEMENTS = before
    assert nn.Module.__getattr__ is not Init and Init._active is None
    assert model.tied.weight is model.layers[0].weight
    held = sum(init_module.slice_of(p).own.numel() for p in model.parameters())
    assert held <= sum(p.numel() for p in wanted.parameters()) / ranks + 64
    for p in model.parameters():
        assert p.isnan().all() and p.untyped_storage().nbytes() <= 4
    with GatheredParameters(model.layers[2].weight):
        assert torch.equal(model.layers[2].weight, wanted.layers[2].weight)
    with GatheredParameters(model.scale, modifier_rank=0), torch.no_grad():
        model.scale.fill_(9.0 - rank)
        wanted.scale.fill_(9.0)
    zero = Zero(
        model,
        Topology.build(),
        stage=3,
        dtype=torch.bfloat16,
        device=CPU,
        initial=lambda place: torch.zeros(0),
        units=[f"layers.{i}" for i in range(6)],
    )
    register(zero, no_states)
    gc.collect()
    assert all(init_module.slice_of(p) is None for p in model.parameters())
    for p, reference in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(safe_get_full_fp32_param(p), reference), "the master is made from what was never cast"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("live", [10_000, 0])
def test_init_builds_in_slices(ranks: Any, size: int, live: int) -> None:
    ranks.run(check_init, size, live)


def test_init_steps_aside() -> None:
    for settings in (
        {"enabled": False},
        {"config_dict_or_path": {"train_batch_size": 1, "zero_optimization": {"stage": 2}}},
    ):
        with Init(**settings):
            layer = nn.Linear(4, 4)
        assert not layer.weight.isnan().any() and init_module.slice_of(layer.weight) is None
    with pytest.raises(ZeroDivisionError), Init():
        1 / 0  # noqa: B018
    assert Init._active is None and nn.Linear(2, 2).weight.isfinite().all()


def check_one_rank_alone() -> None:
    """A rank builds a model by itself, and the other one goes away."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    dist.barrier()
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError) as failed, Init():
            nn.Linear(64, 64)
        assert any("every rank builds and loads the same models" in note for note in failed.value.__notes__)
    dist.destroy_process_group()


def test_init_on_one_rank_alone(ranks: Any) -> None:
    ranks.run(check_one_rank_alone, 2, group=False)


def check_init_of_a_module() -> None:
    model = make(Blocks)
    Init(module=model, config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}})
    assert model.head.weight.isnan().all()
    with GatheredParameters(model.head.weight):
        assert torch.equal(model.head.weight, make(Blocks).head.weight)


def test_init_cuts_a_module(ranks: Any) -> None:
    ranks.run(check_init_of_a_module, 2)
