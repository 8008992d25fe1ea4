"""initialize(): what may be given, what wins, what comes back, and every refusal."""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import megazero
from megazero.base.errors import ConfigError
from megazero.config.schema import OptimizerConfig, RunConfig, TrainingConfig
from megazero.engine.engine import Engine
from megazero.engine.optimizers import Adagrad, CPUAdam
from megazero.parallel.topology import Topology
from tests.engine.fronts import (
    LR,
    Regressor,
    assert_like,
    batch_of,
    config_of,
    engine_of,
    make,
    masters_of,
    plain,
    train,
)

BARE = {"train_batch_size": 16, "gradient_clipping": 0}


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR)


class Subclassed(torch.optim.AdamW):
    """A user's own."""


OPTIMIZERS = {
    "object": lambda model: {"optimizer": adamw(model.parameters()), "config": BARE},
    "subclass": lambda model: {"optimizer": Subclassed(model.parameters(), lr=LR), "config": BARE},
    "callable": lambda model: {"optimizer": adamw, "config": BARE},
    "callable over given parameters": lambda model: {
        "optimizer": adamw,
        "model_parameters": model.parameters(),
        "config": BARE,
    },
    "by name": lambda model: {"config": config_of()},
    "by name over a list": lambda model: {"model_parameters": list(model.parameters()), "config": config_of()},
    "by name over names": lambda model: {"model_parameters": model.named_parameters(), "config": config_of()},
    "by name over groups": lambda model: {
        "model_parameters": [
            {"params": model.blocks.parameters(), "name": "blocks"},
            {"params": [*model.norm.parameters(), *model.head.parameters()], "lr": LR},
        ],
        "config": config_of(),
    },
    "object wins over the name": lambda model: {
        "optimizer": adamw(model.parameters()),
        "config": config_of(optimizer={"type": "SGD", "params": {"lr": 1.0}}),
    },
    "Muon's sibling by torch's name": lambda model: {
        "config": config_of(optimizer={"type": "adamw", "params": {"lr": LR}})
    },
}


@pytest.mark.parametrize("how", OPTIMIZERS)
def test_optimizer_given_how(how: str) -> None:
    model = make()
    engine, optimizer, loader, scheduler = megazero.initialize(model=model, **OPTIMIZERS[how](model))
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer is engine.optimizer
    assert loader is None and scheduler is None
    train(engine, 3)
    assert_like(engine, plain(3)[0])


SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 4, "warmup_type": "linear"}}


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


@pytest.mark.parametrize(
    ("given", "client"),
    [("object", True), *((given, client) for given in ("callable", "name", "both") for client in (True, False))],
)
def test_scheduler_given_how(given: str, client: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    inner = adamw(model.parameters())
    config = config_of() | ({"scheduler": SCHEDULER} if given in ("name", "both") else {})
    if client:
        del config["optimizer"]
    chosen = {"object": halving(inner), "callable": halving, "name": None, "both": halving}[given]
    engine, optimizer, _, scheduler = megazero.initialize(
        model=model, optimizer=inner if client else None, lr_scheduler=chosen, config=config
    )
    rates = []
    for step in range(3):
        train(engine, 1, first=step)
        rates.append(engine.get_lr()[0] / LR)
    assert rates == pytest.approx([0.0, 0.25, 0.5] if given == "name" else [0.5, 0.25, 0.125])
    assert scheduler is engine.lr_scheduler is not None
    said = "the lr_scheduler given to initialize() is used, not the configuration's WarmupLR" in capsys.readouterr().out
    assert said == (given == "both")
    optimizer.param_groups[0]["lr"] = 0.125
    assert engine.get_lr() == [0.125]


def test_the_scripts_scheduler_leaves_the_configurations_open() -> None:
    """Its "auto" asks for a number of steps that nobody needs then."""
    params = {"warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    config = config_of() | {"scheduler": {"type": "WarmupDecayLR", "params": params}}
    with pytest.raises(ConfigError, match="total_num_steps"):
        megazero.initialize(model=make(), config=config)
    *_, scheduler = megazero.initialize(model=make(), config=config, lr_scheduler=halving)
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)


def check_schedule_of_another_optimizer(kind: str, stage: int) -> None:
    """accelerate with offload: the optimizer is made anew over the groups of the script's, which its scheduler sets."""
    warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: min(1, step / 3))
    model, alone = make(), make()
    scripts, reference = (getattr(torch.optim, kind)(each.parameters(), lr=LR) for each in (model, alone))
    scheduler, alone_scheduler = warm_up(scripts), warm_up(reference)
    defaults = {name: scripts.defaults[name] for name in ("lr", "weight_decay")}
    if kind == "Adagrad":
        moved: torch.optim.Optimizer = Adagrad(scripts.param_groups, **defaults)
    else:
        moved = CPUAdam(scripts.param_groups, adamw_mode=kind == "AdamW", **defaults)
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    engine = megazero.initialize(model=model, optimizer=moved, config=BARE | {"zero_optimization": zero})[0]
    for step in range(5):
        train(engine, 1, first=step)
        reference.zero_grad()
        alone(*batch_of(step)).backward()
        reference.step()
        scheduler.step()
        alone_scheduler.step()
        assert engine.get_lr() == scheduler.get_last_lr() == alone_scheduler.get_last_lr()
    assert engine.get_lr() == [LR]
    assert_like(engine, alone)


@pytest.mark.parametrize(("kind", "stage"), [("AdamW", 2), ("AdamW", 3), ("Adam", 2), ("Adagrad", 2)])
def test_schedule_of_another_optimizer(ranks: Any, kind: str, stage: int) -> None:
    ranks.run(check_schedule_of_another_optimizer, 2, kind, stage)


def check_zeros() -> None:
    settings = ("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    zeros = dict.fromkeys((*settings, "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), 0)
    engine = engine_of(config=config_of(3, zero_optimization={"stage": 3, **zeros}))
    train(engine, 3)
    assert_like(engine, plain(3)[0])


def test_a_stage_3_section_full_of_zeros(ranks: Any) -> None:
    """As configurations of stage 3 have it that fetch nothing ahead."""
    ranks.run(check_zeros, 2)


def test_what_the_script_gives_wins_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    megazero.initialize(model=model, optimizer=adamw(model.parameters()), config=config_of())
    assert "the optimizer given to initialize() is used, not the configuration's AdamW" in capsys.readouterr().out


def test_forms_of_a_configuration(tmp_path: Path) -> None:
    config = config_of(gas=2)
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    coded = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    args = argparse.Namespace(deepspeed_config=str(path), local_rank=-1)
    calls: list[dict[str, Any]] = [
        {"config": config},
        {"config": path},
        {"config": str(path)},
        {"config": coded},
        {"config_params": config},
        {"args": args},
    ]
    for call in calls:
        engine = megazero.initialize(model=make(), **call)[0]
        assert (engine.gradient_accumulation_steps(), engine.train_batch_size()) == (2, 16)
        assert engine.train_micro_batch_size_per_gpu() == 8
        assert engine.config["zero_optimization"] == {"stage": 1} and engine.config.get("nothing") is None
    with pytest.raises(ConfigError, match=r"got a configuration 2 times: args\.deepspeed_config, config\. Give one"):
        megazero.initialize(args, make(), config=config)
    with pytest.raises(ConfigError, match=r"needs a configuration: config= the path"):
        megazero.initialize(model=make())
    with pytest.raises(ConfigError, match=r"needs model="):
        megazero.initialize(config=config)
    for strange, said in (("gpt2", "'gpt2', a str"), (Regressor, "a type"), ([make()], "a list")):
        with pytest.raises(ConfigError, match=rf"(?s)model=.*{said}, is no module\. Give an nn\.Module"):
            megazero.initialize(model=strange, config=config)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"mesh_param=\(1, 2\).*Leave it out"):
        megazero.initialize(model=make(), config=config, mesh_param=(1, 2))


def test_a_run_config() -> None:
    settings = RunConfig(training=TrainingConfig(precision="auto", micro_batch_size=16, global_batch_size=16))
    model = make()
    engine = megazero.initialize(model=model, optimizer=adamw(model.parameters()), config=settings)[0]
    assert engine.settings.training.precision == "fp32" and engine.max_norm == 1.0
    train(engine, 2)
    assert_like(engine, plain(2, clip=1.0)[0])
    assert engine.lr_scheduler is None  # the course is of the section's own optimizer
    with pytest.raises(ConfigError, match=r"'cosine' needs to know how long .* Give training\.train_iters or"):
        megazero.initialize(model=make(), config=settings)
    constant = replace(settings, optimizer=OptimizerConfig(lr=0.01, lr_decay_style="constant"))
    by_settings = megazero.initialize(model=make(), config=constant)[0]
    assert isinstance(by_settings.optimizer.inner, torch.optim.AdamW)  # type: ignore[union-attr]
    train(by_settings, 2)
    assert by_settings.get_lr() == [0.01] * len(by_settings.optimizer.param_groups)  # type: ignore[union-attr]
    with pytest.raises(AttributeError):
        _ = by_settings.config


def test_parameters_that_are_not_listed_are_not_trained() -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = engine_of(model, config_of(), model_parameters=model.head.parameters())
    train(engine, 2)
    after = masters_of(engine)
    assert all(torch.equal(value, before[name]) == (not name.startswith("head")) for name, value in after.items())
    assert all(p.requires_grad and p.grad is None for p in engine.module.parameters())


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_parameters_cost_nothing_and_stay(stage: int) -> None:
    model = make()
    model.blocks.requires_grad_(False)
    engine = engine_of(model, config_of(stage, "bf16"))
    held = sum(cut.flat.numel() for cut in engine.shards.cuts)  # type: ignore[union-attr]
    assert held == sum(p.numel() for p in [*make().norm.parameters(), *make().head.parameters()])
    train(engine, 2)
    found = masters_of(engine)
    for name, value in make().blocks.state_dict().items():
        assert torch.equal(found[f"blocks.{name}"], value.bfloat16().float())
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expert, self.router = nn.Linear(4, 4), nn.Linear(4, 4)


def test_groups_that_share_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = Experts()
    groups = [
        {"params": [*model.router.parameters(), *model.expert.parameters()], "name": "parameters"},
        {"params": list(model.expert.parameters()), "moe": True, "name": "moe_parameters"},
    ]
    engine = engine_of(model, config_of(), model_parameters=groups)
    assert "2 parameters stood in a group marked moe and in another one" in capsys.readouterr().out
    assert [sum(p.numel() for p in group["params"]) for group in engine.optimizer.param_groups] == [20, 20]  # type: ignore[union-attr]
    assert [group["name"] for group in engine.optimizer.param_groups] == ["parameters", "moe_parameters"]  # type: ignore[union-attr]
    for group in groups:
        group.pop("moe", None)
    with pytest.raises(
        ConfigError, match=r"lists 2 parameters more than once: expert\.weight, expert\.bias\. List each"
    ):
        engine_of(model, config_of(), model_parameters=groups)


def check_broadcast() -> None:
    """Every rank starts from rank 0's weights and buffers."""
    rank = Topology.build().rank
    for stage in (0, 3):
        torch.manual_seed(7 + rank)
        model = Regressor()
        model.register_buffer("table", torch.full((3,), float(rank)))
        model.register_buffer("flag", torch.tensor([rank == 0]))
        engine = engine_of(model, config_of(stage))
        assert_like(engine, _with_buffers(make()), 0.0)
        assert engine.module.table.tolist() == [0.0] * 3 and engine.module.flag.item() is True


def _with_buffers(model: nn.Module) -> nn.Module:
    model.register_buffer("table", torch.zeros(3))
    model.register_buffer("flag", torch.tensor([True]))
    return model


def test_ranks_start_equal(ranks: Any) -> None:
    ranks.run(check_broadcast, 2)


def test_buffers_follow_the_weights_as_module_to_does() -> None:
    model = make()
    model.register_buffer("running", torch.full((2,), 1 / 3))
    model.register_buffer("frequencies", torch.full((2,), 1 / 3), persistent=False)
    model.register_buffer("count", torch.tensor(3))
    engine = engine_of(model, config_of(1, "bf16"))
    assert engine.module.running.dtype == torch.bfloat16
    assert engine.module.frequencies.dtype == torch.float32 and engine.module.count.dtype == torch.int64


def test_masters_come_from_uncast_weights() -> None:
    engine = engine_of(config=config_of(1, "bf16"))
    assert_like(engine, make(), 0.0)
    sixteen = engine.consolidated_state_dict()
    assert all(torch.equal(value, make().state_dict()[name].bfloat16()) for name, value in sixteen.items())


def check_torchrun() -> tuple[int, str]:
    """As under a launcher: initialize() joins the group by itself."""
    assert not torch.distributed.is_initialized()
    engine = engine_of()
    assert torch.distributed.get_world_size() == engine.world_size == 2 == engine.dp_world_size
    train(engine, 2)
    assert_like(engine, plain(2)[0])
    found = engine.local_rank, engine.device.type
    torch.distributed.destroy_process_group()
    return found


def test_joins_the_launchers_group(ranks: Any) -> None:
    assert [rank for rank, _ in ranks.run(check_torchrun, 2, group=False)] == [0, 1]


def test_a_plain_process(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, megazero\n"
        "model = torch.nn.Linear(2, 1)\n"
        "engine, optimizer, _, _ = megazero.initialize(model=model, config={'train_batch_size': 2,\n"
        "    'optimizer': {'type': 'Adam', 'params': {'lr': 0.1}}})\n"
        "loss = engine(torch.ones(2, 2)).mean()\n"
        "engine.backward(loss)\n"
        "engine.step()\n"
        "assert engine.global_steps == 1 and not torch.distributed.is_initialized()\n"
        "megazero.init_distributed()\n"
        "assert torch.distributed.get_rank() == 0 and torch.distributed.get_world_size() == 1\n"
        "engine = megazero.initialize(model=torch.nn.Linear(2, 1), config={'train_batch_size': 2})[0]\n"
        "print('done', engine.local_rank)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.endswith("done 0\n"), done.stderr


def test_init_distributed_by_address_needs_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"rank=-1 and world_size=-1: an address needs both"):
        megazero.init_distributed(init_method="tcp://127.0.0.1:1")


def test_tensor_parallelism_of_a_module_from_elsewhere(ranks: Any) -> None:
    ranks.run(check_tensor_parallel, 2)


def check_tensor_parallel() -> None:
    with pytest.raises(ConfigError, match=r"tp_size 2 with a Regressor: modules from elsewhere are not split"):
        engine_of(config=config_of(tensor_parallel={"tp_size": 2}))


def test_the_batch_does_not_fit(ranks: Any) -> None:
    ranks.run(check_batch, 2)


def check_batch() -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size 5"):
        engine_of(config=config_of() | {"train_batch_size": 5})


def test_the_lazy_package() -> None:
    assert megazero.Engine is Engine
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = megazero.nothing
