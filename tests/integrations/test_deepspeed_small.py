"""ProcessTopology, OnDevice and the memory estimates, imported as scripts do."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from megazero.base.errors import ConfigError
from megazero.config.layers import Setting, assemble
from megazero.config.validate import resolve
from megazero.integrations import deepspeed as alias
from megazero.integrations import deepspeed_memory as memory
from megazero.models.gpt import GPT
from megazero.parallel.topology import Topology
from megazero.plan.ladder import Machines, rows

GB = 2**30


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # other tests of this session have imported transformers
        alias.install()
    yield
    alias.uninstall()


# ProcessTopology


def cube() -> Any:
    return importlib.import_module("deepspeed.runtime.pipe.topology").ProcessTopology(
        axes=["pipe", "data", "model"], dims=[2, 3, 2]
    )


def test_coordinates_and_ranks() -> None:
    topology = cube()
    assert topology.world_size() == 12 and topology.get_axis_names() == ["pipe", "data", "model"]
    assert [topology.get_dim(axis) for axis in ("pipe", "data", "model", "expert")] == [2, 3, 2, 0]
    for rank in range(12):
        place = topology.get_coord(rank)
        assert rank == (place.pipe * 3 + place.data) * 2 + place.model
        assert topology.get_rank(**place._asdict()) == rank == topology.mapping[place]
    assert topology.get_coord(7) == topology.ProcessCoord(pipe=1, data=0, model=1)
    assert topology.get_rank_repr(7) == "model_01"
    assert topology.get_rank_repr(11, omit_axes=["model"], inner_sep=".", outer_sep="/") == "pipe.01/data.02"


def test_ranks_along_an_axis() -> None:
    topology = cube()
    assert topology.get_axis_comm_lists("pipe") == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]
    assert topology.get_axis_comm_lists("data") == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    assert topology.get_axis_comm_lists("model")[-1] == [10, 11] and topology.get_axis_comm_lists("expert") == []
    assert topology.filter_match(pipe=0, data=1) == [2, 3] and topology.filter_match() == list(range(12))
    assert topology.get_axis_list("model", 1) == [1, 3, 5, 7, 9, 11] and topology.filter_match(data=7) == []


def test_ranks_are_counted_as_megazero_counts_them() -> None:
    topology = cube()
    for rank in range(12):
        place = topology.get_coord(rank)
        assert Topology(pp=2, dp=3, tp=2, rank=rank).coord == {
            "pp": place.pipe,
            "dp": place.data,
            "cp": 0,
            "tp": place.model,
        }


def test_what_a_topology_refuses() -> None:
    topology = cube()
    for coord in {"pipe": 0}, {"pipe": 0, "data": 3, "model": 0}, {"pipe": 0, "data": 0, "model": 0, "expert": 0}:
        with pytest.raises(
            ValueError, match=r"get_rank\(pipe=0.*each axis of pipe=2, data=3, model=2.*filter_match\(\)"
        ):
            topology.get_rank(**coord)
    with pytest.raises(ValueError, match=r"get_coord\(12\): there are ranks 0 to 11"):
        topology.get_coord(12)
    with pytest.raises(ValueError, match=r"filter_match\(tensor=0\): the axes are pipe, data, model"):
        topology.filter_match(tensor=0)
    for axes, dims in (["a", "a"], [1, 2]), (["a"], [1, 2]), (["a"], [0]), ([], []):
        with pytest.raises(ConfigError, match=r"ProcessTopology\(axes=.*one size of 1 or more"):
            type(topology)(axes, dims)


# OnDevice


def test_on_device() -> None:
    deepspeed = importlib.import_module("deepspeed")
    with deepspeed.OnDevice(dtype=torch.float16, device="meta"):
        model = nn.Linear(3, 3)
        with deepspeed.OnDevice(torch.bfloat16, device="cpu"):
            inner = nn.Linear(2, 2)
        assert torch.zeros(1).is_meta and torch.zeros(1).dtype == torch.float16
    assert model.weight.is_meta and model.weight.dtype == model.bias.dtype == torch.float16
    assert inner.weight.device.type == "cpu" and inner.weight.dtype == torch.bfloat16 and inner.weight.any()
    with pytest.raises(KeyError), deepspeed.OnDevice(dtype=torch.float16):
        raise KeyError
    with deepspeed.OnDevice(dtype=torch.float16, enabled=False):
        plain = nn.Linear(1, 1)
    assert plain.weight.dtype == torch.float32 == torch.get_default_dtype() and not torch.zeros(1).is_meta
    for wrong in torch.int8, "fp16":
        with pytest.raises(ConfigError, match=rf"OnDevice\(dtype='?{wrong}'?\).*Give torch.bfloat16"):
            deepspeed.OnDevice(dtype=wrong)


# memory estimates


def estimates(capsys: pytest.CaptureFixture[str], stage: int, kind: str, *sizes: Any, **more: Any) -> Any:
    """{options: (CPU, GPU)} in bytes of a printed table, and its lines."""
    home = importlib.import_module(f"deepspeed.runtime.zero.{'stage3' if stage == 3 else 'stage_1_and_2'}")
    assert getattr(home, f"estimate_zero{stage}_model_states_mem_needs_all_{kind}")(*sizes, **more) is None
    lines = capsys.readouterr().out.splitlines()
    found = {}
    for line in lines[4:]:
        cpu, gpu, options = (cell.strip() for cell in line.split("|"))
        found[options.replace(" ", "")] = float(cpu.removesuffix("GB")) * GB, float(gpu.removesuffix("GB")) * GB
    return found, lines


def test_estimates_are_those_of_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/zero.md's bytes a parameter over N = 16 ranks, and buckets of 40 million elements, three at a time."""
    total, layer, n, buffers = 8e9, 2e8, 16, 0.04e9
    found, lines = estimates(capsys, 2, "cold", int(total), num_gpus_per_node=8, num_nodes=2)
    assert lines[1:4] == [
        "HW: Setup with 2 nodes, 8 GPUs per node.",
        "SW: Model with 8,000,000,000 total params. GB are 2^30 bytes.",
        "  per CPU  |  per GPU |   Options",
    ]
    reduced = 3 * buffers * 4
    assert found == {
        "offload_optimizer=cpu": pytest.approx((1.5 * 8 * 4 * total, 2 * total + reduced), abs=GB * 0.006),
        "offload_optimizer=none": pytest.approx((1.5 * 8 * 4 * total, (2 + 16 / n) * total + reduced), abs=GB * 0.006),
    }
    found, lines = estimates(capsys, 3, "cold", int(total), int(layer), 8, 2, additional_buffer_factor=1)
    assert lines[2] == "SW: Model with 8,000,000,000 total params, 200,000,000 largest layer params. GB are 2^30 bytes."
    whole, part = 8 * 4 * total, 8 * 4 * (total / n + layer)
    live, updated = reduced + 2 * 2 * layer, 8 * 4 * buffers / n  # the layer in use and the next; a bucket's slice
    expected = {
        ("cpu", "cpu"): (18 / n, 0),
        ("none", "cpu"): (16 / n, 2 / n),
        ("none", "none"): (0, 18 / n),
    }
    assert len(found) == 6
    for (param, optimizer), (cpu, gpu) in expected.items():
        for init, building in (1, part), (0, whole):
            wanted = max(8 * cpu * total + updated * (cpu > 0), building), gpu * total + live
            options = f"offload_param={param},offload_optimizer={optimizer},zero_init={init}"
            assert found[options] == pytest.approx(wanted, abs=GB * 0.006), options


def small_model() -> tuple[Any, nn.Module]:
    """A configuration of 4 ranks, and its model on meta."""
    values = {
        "model.num_layers": 4,
        "model.hidden_size": 2048,
        "model.num_attention_heads": 16,
        "model.vocab_size": 32000,
        "data.seq_length": 128,
        "data.mock_data": True,
        "training.train_iters": 1,
        "training.micro_batch_size": 1,
        "training.precision": "bf16",
    }
    config = resolve(assemble([{key: Setting(value, "test") for key, value in values.items()}]), 4)
    with torch.device("meta"):
        model: Any = GPT(config.model, Topology.single())
    model.units = ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(4)), "model.norm", "lm_head"]
    return config, model


def test_a_models_estimates_are_those_of_megazero_plan(capsys: pytest.CaptureFixture[str]) -> None:
    config, model = small_model()
    planned = {row.choice: row.homes for row in rows(config, Machines(4, 4, 80 * GB))}
    for stage in 2, 3:
        found, _ = estimates(capsys, stage, "live", model, 4, additional_buffer_factor=1)
        for options, (cpu, gpu) in found.items():
            homes = dict(option.split("=") for option in options.split(","))
            of = planned[stage, homes["offload_optimizer"], homes.get("offload_param", "none")]
            states = {k: v for k, v in of.device.items() if k not in ("activations", "working memory")}
            assert gpu == pytest.approx(sum(states.values()), rel=0.02, abs=GB * 0.006), options
            if homes.get("zero_init") == "1" and homes["offload_optimizer"] == "cpu":
                assert cpu == pytest.approx(sum(of.cpu.values()) * 4, rel=0.02), options


def test_shared_parameters_count_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert "SW: Model with 64 total params" in estimates(capsys, 2, "live", model)[1][2]
    assert "64 total params, 64 largest" in estimates(capsys, 3, "live", model)[1][2]


@pytest.mark.parametrize(
    ("stage", "kind", "sizes", "said"),
    [
        (2, "cold", (0,), "total_params=0: it is 1 or more"),
        (2, "cold", (10, 0), "num_gpus_per_node=0"),
        (3, "cold", (10, 4, 1, 0), "num_nodes=0"),
        (3, "cold", (4, 10), r"largest_layer_params=10 is more than total_params=4.*The order is"),
        (3, "live", (nn.ReLU(),), "ReLU has no parameters"),
    ],
)
def test_what_estimates_refuse(
    stage: int, kind: str, sizes: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=said):
        estimates(capsys, stage, kind, *sizes)
    assert memory.CHOICES.keys() == {2, 3}
