"""The small names of the alias: checkpointing.configure, comm, accelerator, loaders, copies, logs."""

from __future__ import annotations

import base64
import json
import types
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.integrations import deepspeed_checkpointing as checkpointing
from megazero.integrations import deepspeed_comm as comm
from megazero.integrations import deepspeed_names as names
from megazero.integrations.deepspeed_accelerator import get_accelerator
from megazero.parallel.topology import Topology
from tests.harness import Ranks

SEED = {
    "partition_activations": True,
    "cpu_checkpointing": True,
    "contiguous_memory_optimization": True,
    "number_checkpoints": 4,
    "synchronize_checkpoint_boundary": False,
    "profile": False,
}


@pytest.fixture(autouse=True)
def as_at_the_start() -> Iterator[None]:
    yield
    forget()


def forget() -> None:
    checkpointing.State.configured = checkpointing.State.synchronize = False
    checkpointing.State.saved = None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 6), 0

    def forward(self, x: Tensor) -> Any:
        return checkpointing.checkpoint(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x).tanh() + x


def gradient(x: Tensor) -> tuple[Tensor, list[int]]:
    """Of x through four layers that checkpoint themselves, and how often each ran."""
    torch.manual_seed(1)
    layers = [Layer() for _ in range(4)]
    x = y = x.clone().requires_grad_()
    for layer in layers:
        y = layer(y)
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad, [layer.calls for layer in layers]


def check_partitioned() -> None:
    topology = Topology.build(tp=2)
    x = torch.arange(12.0).view(2, 6) / 10
    plain, calls = gradient(x)
    assert calls == [2] * 4
    mpu = types.SimpleNamespace(get_model_parallel_group=lambda: dist.group.WORLD)
    for given in topology, mpu:
        checkpointing.configure(given, {"activation_checkpointing": SEED})
        saved = checkpointing.State.saved
        assert saved is not None and saved.group is not None and saved.group.size == 2 and saved.slots == 4
        partitioned, calls = gradient(x)
        assert torch.equal(plain, partitioned) and calls == [2] * 4
        assert saved._free and all(len(free) == 4 for free in saved._free.values())
        checkpointing.reset()
        assert checkpointing.State.saved is not None and not checkpointing.State.saved._free
    forget()


def test_the_seeds_section_partitions_and_keeps_in_one_buffer(ranks: Ranks) -> None:
    ranks.run(check_partitioned, 2)


def test_configure_from_a_path_text_or_arguments(tmp_path: Path) -> None:
    assert not checkpointing.is_configured()
    text = json.dumps({"activation_checkpointing": SEED, "train_batch_size": 1})
    (tmp_path / "ds_config.json").write_text(text)
    for source in (
        tmp_path / "ds_config.json",
        str(tmp_path / "ds_config.json"),
        base64.b64encode(text.encode()).decode(),
    ):
        checkpointing.configure(None, source, num_checkpoints=7, synchronize=True)
        saved = checkpointing.State.saved
        assert saved is not None and saved.offload and saved.slots == 7 and saved.group is None
        assert checkpointing.State.synchronize and checkpointing.is_configured()
        forget()
    checkpointing.configure(deepspeed_config={})
    assert checkpointing.State.saved is not None and not checkpointing.State.saved.offload


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"cpu_checkpoint": True}, "activation_checkpointing.cpu_checkpoint: there is no .* mean cpu_checkpointing"),
        ({"contiguous_memory_optimization": True}, "without number_checkpoints: .* Give number_checkpoints"),
        ({"profile": True}, "profile=true: .* Leave it out"),
    ],
)
def test_what_configure_refuses(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checkpointing.configure(None, {"activation_checkpointing": section})


def test_initialize_applies_the_section_unless_the_script_has_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = type("Engine", (), {"topology": Topology.single()})()
    monkeypatch.setattr("megazero.initialize", lambda args=None, **given: (engine, None, None, None), raising=False)
    config = {"activation_checkpointing": SEED}
    names.initialize(config=config)
    assert checkpointing.State.saved is not None and checkpointing.State.saved.slots == 4
    assert not checkpointing.is_configured()
    checkpointing.configure(deepspeed_config={})
    names.initialize(None, config_params=config)
    assert checkpointing.State.saved.slots == 0
    forget()
    names.initialize(types.SimpleNamespace(deepspeed_config=config))
    assert checkpointing.State.saved is not None and checkpointing.State.saved.slots == 4


def check_alone() -> None:
    comm.init_distributed(dist_init_required=False)
    assert not dist.is_initialized() and (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    comm.barrier()
    comm.init_distributed("gloo", auto_mpi_discovery=False, timeout=timedelta(seconds=30))
    assert (dist.get_rank(), comm.get_world_size()) == (0, 1)
    dist.destroy_process_group()


def test_a_process_without_a_launcher_is_rank_0_of_1(ranks: Ranks) -> None:
    ranks.run(check_alone, 1)


def test_accelerator() -> None:
    here = get_accelerator()
    kind = here.device_name()
    assert here is get_accelerator() and here.device().type == kind == here.current_device_name().partition(":")[0]
    assert here.device_name(3) == ("cpu" if kind == "cpu" else "cuda:3")
    assert here.communication_backend_name() == ("gloo" if kind == "cpu" else "nccl")
    assert here.on_accelerator(torch.zeros(1, device=here.device())) and here.device_count() >= 1
    assert here.is_available() and here.is_bf16_supported() and here.is_fp16_supported()
    assert here.is_synchronized_device() == (kind == "cpu")
    here.synchronize()
    here.empty_cache()
    here.manual_seed_all(3)
    with pytest.raises(AttributeError, match=r"get_accelerator\(\).nothing: torch.* has no nothing. Ask torch itself"):
        _ = here.nothing
    assert torch.equal(here.pin_memory(torch.ones(2)), torch.ones(2))


def test_copies_have_memory_of_their_own() -> None:
    big = torch.arange(100.0)
    copy = names.clone_tensors_for_torch_save({"a": [big[:2], (big[2:3], 7)]})
    assert copy["a"][0].untyped_storage().nbytes() == 8 and copy["a"][1][1] == 7
    assert torch.equal(copy["a"][1][0], big[2:3])


def test_tied_weights_stay_tied_in_a_copy() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    before = model.state_dict() | {"row": model[0].weight[0]}
    copy = names.clone_tensors_for_torch_save(before)
    at = {name: value.data_ptr() for name, value in copy.items()}
    assert at["0.weight"] == at["1.weight"] and len(set(at.values())) == len(before) - 1
    assert not set(at.values()) & {value.data_ptr() for value in before.values()}
    assert all(torch.equal(copy[name], value) for name, value in before.items())


def test_move_to_device() -> None:
    moved = names.move_to_device({"x": [torch.ones(1), 3]}, "meta")
    assert moved["x"][0].is_meta and moved["x"][1] == 3
    kept = names.move_to_device([torch.ones(1)], "meta", lambda item: isinstance(item, Tensor) and item.numel() > 1)
    assert not kept[0].is_meta


def test_a_loader_that_repeats() -> None:
    loader = names.RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1] and len(loader) == 2 and iter(loader) is loader


def test_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names.logger.handlers[0], "stream", __import__("sys").stdout)
    names.log_dist("all", ranks=None)
    names.log_dist("one", ranks=[0])
    names.log_dist("another", ranks=[1])
    names.see_memory_usage("quiet")
    names.see_memory_usage("loud", force=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["[INFO] [rank 0] all", "[INFO] [rank 0] one"]
    assert len(lines) == 3 and lines[2].startswith("[INFO] loud | memory ")


def test_leaf_modules_are_units_of_stage_3() -> None:
    from megazero.engine.units import units_of

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    model = nn.Sequential(nn.Linear(2, 2), Choice())
    assert "1" not in units_of(model)
    assert names.set_z3_leaf_modules(model, [Choice]) == [model[1]]
    assert "1" in units_of(model) and "1.experts.0" not in units_of(model)
    assert names.set_z3_leaf_modules(nn.Sequential(model[1], Choice()), ["Choice"])[0] is model[1]
    with pytest.raises(ValueError, match=r"no module of the model is of class Mixtral. It has Choice, Linear, Mod"):
        names.set_z3_leaf_modules(model, ["Mixtral"])


def test_constructors_are_left_alone() -> None:
    assert names.zero_wrapper_for_fp_tensor_constructor(torch.empty, torch.float16) is torch.empty
