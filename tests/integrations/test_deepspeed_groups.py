"""`deepspeed.utils.groups` as scripts use it: before initialize, over every axis of an engine, and when it is gone."""

from __future__ import annotations

import gc
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megazero.base.errors import ConfigError
from megazero.engine.engine import Engine
from megazero.integrations import deepspeed as alias
from megazero.integrations import deepspeed_groups as own
from megazero.parallel.topology import Topology
from tests.engine.fronts import assert_like, config_of, make, parts_of, plain
from tests.harness import Ranks

KINDS = {  # the underscore-less and the underscored names of an axis of Topology
    "dp": ["get_data_parallel", "_get_data_parallel"],
    "zero": ["_get_sequence_data_parallel"],
    "cp": ["_get_sequence_parallel"],
    "tp": ["get_tensor_model_parallel"],
    "model": ["get_model_parallel"],
}


@contextmanager
def script() -> Iterator[tuple[Any, Any]]:
    """What `import deepspeed` and `from deepspeed.utils import groups` give to a script that has just begun."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # other tests of this process have imported transformers
        alias.install()
    try:
        yield importlib.import_module("deepspeed"), importlib.import_module("deepspeed.utils.groups")
    finally:
        alias.uninstall()
        own.Last.engine = own._nothing


def summed(group: Any) -> list[int]:
    """The members of a process group, as one of its collectives sees them."""
    here = torch.zeros(dist.get_world_size())
    here[dist.get_rank()] = 1
    dist.all_reduce(here, group=group)
    return [int(at) for at in here.nonzero()]


def assert_answers(groups: Any, topology: Topology) -> None:
    """Group, rank and world size of every kind are the topology's, and the groups communicate."""
    for axis, starts in KINDS.items():
        expected = topology.group(axis)
        for start in starts:
            handle = getattr(groups, f"{start}_group")()
            assert isinstance(handle, dist.ProcessGroup) and handle is getattr(groups, f"{start}_group")()
            assert dist.get_process_group_ranks(handle) == list(expected.ranks) == summed(handle)
            assert getattr(groups, f"{start}_rank")() == expected.rank == dist.get_rank(handle)
            assert getattr(groups, f"{start}_world_size")() == expected.size == dist.get_world_size(handle)
    for axis, start in ("ep", "_get_expert_parallel"), ("expert_dp", "_get_expert_data_parallel"):
        name, expected = f"ep_size_{topology.ep}", topology.group(axis)
        handle = getattr(groups, f"{start}_group")(name)
        assert summed(handle) == list(expected.ranks) == getattr(groups, f"{start}_group_ranks")(name)
        assert getattr(groups, f"{start}_rank")(name) == expected.rank
        assert getattr(groups, f"{start}_world_size")(name) == expected.size
        assert getattr(groups, f"{start}_group_dict")() == {name: handle}
    assert groups._get_data_parallel_group_ranks() == list(topology.group("dp").ranks)
    assert groups.get_tensor_model_parallel_src_rank() == topology.group("tp").ranks[0]
    assert groups._get_broadcast_src_rank() == topology.group("zero").ranks[0]
    assert groups._get_model_parallel_world_size() == topology.size("model")
    assert groups._get_expert_parallel_src_rank(name) == topology.group("ep").ranks[0]
    assert groups._get_expert_broadcast_src_rank(name) == topology.group("expert_dp").ranks[0]
    assert groups._get_max_expert_parallel_group() is groups._get_expert_parallel_group(name)
    assert groups._get_max_expert_size() == topology.ep and groups._get_max_expert_size_name() == name


def assert_nothing_laid_out(groups: Any, world: int) -> None:
    """What DeepSpeed says then: all ranks are data parallel."""
    for start in "_get_data_parallel", "_get_sequence_data_parallel":
        assert getattr(groups, f"{start}_world_size")() == world
        assert getattr(groups, f"{start}_rank")() == (dist.get_rank() if world > 1 else 0)
    assert groups._get_data_parallel_group_ranks() == list(range(world)) and groups._get_broadcast_src_rank() == 0
    assert groups._get_model_parallel_world_size() == groups._get_sequence_parallel_world_size() == 1
    assert groups._get_sequence_parallel_rank() == 0
    asked = [getattr(groups, name) for name in dir(groups) if name.startswith("get_") and name.endswith("_group")]
    assert len(asked) == 3
    for ask in [*asked, groups._get_sequence_parallel_group, groups.get_data_parallel_rank]:
        with pytest.raises(
            ConfigError, match=r"not known before deepspeed.initialize\(…\), nor once its engine is gone"
        ):
            ask()
    with pytest.raises(ConfigError, match="which ranks are this one's ep group is not known"):
        groups._get_expert_parallel_group("ep_size_1")


def check_data_parallel(steps: int) -> tuple[list[float], float]:
    """A script that averages its losses over the data-parallel group."""
    with script() as (deepspeed, groups):
        deepspeed.init_distributed()
        world = dist.get_world_size()
        assert_nothing_laid_out(groups, world)
        assert summed(groups._get_data_parallel_group()) == list(range(world))
        engine = deepspeed.initialize(model=make(), config=config_of(2))[0]
        assert_answers(groups, engine.topology)
        losses = []
        for step in range(steps):
            ((x, target),) = parts_of(step, engine)
            loss = engine(x, target)
            engine.backward(loss)
            engine.step()
            mean = loss.detach() / groups._get_data_parallel_world_size()
            dist.all_reduce(mean, group=groups._get_data_parallel_group())
            losses.append(mean.item())
        assert_like(engine, plain(steps)[0])
        norm = engine.get_global_grad_norm()
        del engine, loss
        gc.collect()
        assert_nothing_laid_out(groups, world)
        return losses, norm


def test_data_parallel_script_equals_one_process(ranks: Ranks) -> None:
    _, expected, norms = plain(3)
    for losses, norm in ranks.run(check_data_parallel, 2, 3):
        assert losses == pytest.approx(expected, rel=1e-5) and norm == pytest.approx(norms[-1], rel=1e-4)


def check_alone() -> None:
    with script() as (deepspeed, groups):
        assert_nothing_laid_out(groups, 1)
        with pytest.raises(ConfigError, match=r"joined no process group. Call deepspeed.init_distributed\(\)"):
            groups._get_data_parallel_group()
        engine = deepspeed.initialize(model=make(), config=config_of())[0]
        assert_answers(groups, engine.topology)
        dist.destroy_process_group()
        assert groups._get_data_parallel_world_size() == 1
        with pytest.raises(ConfigError, match="joined no process group"):
            groups._get_data_parallel_group()
        with pytest.raises(RuntimeError, match=r"axis tp: this process has none\. Call init_dist"):
            engine.topology.process_group("tp")


def test_one_process(ranks: Ranks) -> None:
    ranks.run(check_alone, 1)


def check_layouts() -> None:
    """Tensor parallelism, then a pipeline: the last engine answers."""
    with script() as (deepspeed, groups):
        pipe = importlib.import_module("deepspeed.pipe")
        config = config_of(1) | {"tensor_parallel": {"autotp_size": 2}}
        split = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        split._tp_plan = {"0": "colwise", "2": "rowwise"}  # type: ignore[assignment]
        first = deepspeed.initialize(model=split, config=config)[0]
        assert groups.get_tensor_model_parallel_world_size() == groups.get_data_parallel_world_size() == 2
        assert_answers(groups, first.topology)
        layers = [pipe.LayerSpec(nn.Linear, 4, 4), pipe.LayerSpec(nn.Linear, 4, 1)]
        topology = pipe.PipeDataParallelTopology(num_pp=2, num_dp=2)
        model = pipe.PipelineModule(layers, topology=topology, loss_fn=F.mse_loss)
        engine = deepspeed.initialize(model=model, config=config_of(0))[0]
        assert groups.get_model_parallel_world_size() == 2 and groups.get_tensor_model_parallel_world_size() == 1
        assert groups._get_data_parallel_group_ranks() == ([0, 1] if dist.get_rank() < 2 else [2, 3])
        assert_answers(groups, engine.topology)
        with pytest.raises(
            ConfigError, match=r"takes a megazero.Topology.*with PipeDataParallelTopology\(num_pp, num_dp"
        ):
            pipe.PipelineModule(layers, topology=pipe.ProcessTopology(["pipe", "data"], [2, 2]))


def test_tensor_parallel_and_pipeline(ranks: Ranks) -> None:
    ranks.run(check_layouts, 4)


@dataclass
class LaidOut:
    """An engine as far as groups need one, over axes that initialize() does not make."""

    topology: Topology


def check_axes(axes: dict[str, int]) -> None:
    with script() as (_, groups):
        engine = LaidOut(Topology.build(**axes))
        own.remember(cast(Engine, engine))
        assert_answers(groups, engine.topology)
        with pytest.raises(ConfigError, match=rf"no expert group 'ep_size_9'.*over {axes['ep']} ranks.*'ep_size_"):
            groups._get_expert_parallel_group("ep_size_9")


@pytest.mark.parametrize(
    "axes", [{"cp": 2, "tp": 2, "ep": 2}, {"pp": 2, "cp": 2, "ep": 1}, {"dp": 2, "tp": 2, "ep": 4}]
)
def test_context_and_expert_parallel(ranks: Ranks, axes: dict[str, int]) -> None:
    ranks.run(check_axes, 4, axes)


def test_initialize_is_not_needed() -> None:
    with script() as (_, groups), pytest.raises(AttributeError, match=r"no deepspeed.utils.groups.initialize. Experts"):
        _ = groups.initialize
