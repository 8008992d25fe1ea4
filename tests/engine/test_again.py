"""initialize() on a module that an engine holds, and destroy(): training goes on as in plain torch with a new
optimizer, the module is an ordinary one in between, and what the engine held is freed."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megazero
from megazero.base.errors import ConfigError
from megazero.zero import GatheredParameters
from megazero.zero.access import owner_of
from megazero.zero.init import slice_of
from tests.engine import moe
from tests.engine.fronts import WIDTH, assert_like, batch_of, config_of, engine_of, hf_model, make, masters_of, train

LR, EPS = 1e-2, 1e-2  # a large eps: a gradient that is wrong by a factor shows in the weights
HOOKS = [
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, eps=EPS)


def settings_of(stage: int, precision: str = "fp32", **zero: Any) -> dict[str, Any]:
    found = config_of(stage, precision)
    del found["optimizer"]
    found["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, **zero}
    return found


def plain_phases(*changes: Callable[[nn.Module], Any]) -> nn.Module:
    """torch: two steps, a change and a new optimizer, two more, and so on."""
    model = make()
    for phase, change in enumerate((lambda model: None, *changes)):
        change(model)
        optimizer = adamw(model)
        for step in range(2 * phase, 2 * phase + 2):
            optimizer.zero_grad()
            model(*batch_of(step)).backward()
            optimizer.step()
    return model


def hooks_of(model: nn.Module) -> list[int]:
    return [len(getattr(module, kind)) for module in model.modules() for kind in HOOKS]


def assert_ordinary(model: nn.Module) -> None:
    """Nothing of an engine is on it, and it is trained as any module is."""
    assert hooks_of(model) == hooks_of(make())
    for module in model.modules():
        assert type(module._parameters) is dict
    for parameter in model.parameters():
        assert owner_of(parameter) is None and not hasattr(parameter, "shard_spec")
        assert not parameter._post_accumulate_grad_hooks
        assert parameter.untyped_storage().nbytes() == parameter.nbytes and parameter.is_leaf
    dtype = next(model.parameters()).dtype
    model(*(tensor.to(dtype) for tensor in batch_of(0))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    model.zero_grad()


CPU = {"offload_optimizer": {"device": "cpu"}}
BOTH = CPU | {"offload_param": {"device": "cpu"}}
OFFLOADS: dict[str, Any] = {"none": ({}, {}), "to cpu": ({}, CPU), "from cpu": (CPU, {}), "all": (BOTH, BOTH)}


def check_again(stages: tuple[int, int], offload: str = "none") -> None:
    model, zero = make(), OFFLOADS[offload]
    first = engine_of(model, settings_of(stages[0], **zero[0]), optimizer=adamw(model))
    train(first, 2)
    optimizer, gone = first.optimizer, [weakref.ref(thing) for thing in (first.zero, *first.zero.buckets)]
    second = engine_of(model, settings_of(stages[1], **zero[1]), optimizer=adamw(model))
    gc.collect()  # the first engine and its optimizer are still held
    assert [ref() for ref in gone] == [None] * len(gone) and optimizer is not None and not optimizer.state
    train(second, 2, first=2)
    assert_like(second, plain_phases(lambda model: None))
    for use in (lambda: first(batch_of(0)[0]), first.step, first.state_dict, lambda: first.backward(torch.ones(()))):
        with pytest.raises(
            ConfigError, match=r"this engine was let go by initialize\(\) of its module.*Use the engine"
        ):
            use()


@pytest.mark.parametrize("stages", list(itertools.product(range(4), range(4))), ids=str)
def test_any_stage_after_any_other(ranks: Any, stages: tuple[int, int]) -> None:
    check_again(stages)
    ranks.run(check_again, 2, stages)


@pytest.mark.parametrize(
    ("stages", "offload"),
    [((1, 3), "to cpu"), ((3, 2), "to cpu"), ((1, 3), "from cpu"), ((3, 2), "from cpu"), ((3, 3), "all")],
    ids=str,
)
def test_with_and_without_offload(ranks: Any, stages: tuple[int, int], offload: str) -> None:
    check_again(stages, offload)
    ranks.run(check_again, 2, stages, offload)


def check_nvme(folder: str, stage: int) -> None:
    model, to = make(), {"device": "nvme", "nvme_path": folder}
    both = {"offload_optimizer": to} | ({"offload_param": to} if stage == 3 else {})
    for phase in range(2):
        engine = engine_of(model, settings_of(stage, **both), optimizer=adamw(model))
        train(engine, 2, first=2 * phase)
    assert_like(engine, plain_phases(lambda model: None))
    engine.destroy()
    if dist.is_initialized():
        dist.barrier()
    assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("stage", [1, 3])
def test_files_are_removed(ranks: Any, stage: int, tmp_path: Path) -> None:
    check_nvme(str(tmp_path), stage)
    ranks.run(check_nvme, 2, str(tmp_path), stage)


def check_masters(stages: tuple[int, int], precisions: tuple[str, str]) -> None:
    model = make()
    first = engine_of(model, settings_of(stages[0], precisions[0]), optimizer=adamw(model))
    train(first, 2)
    before = masters_of(first)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in before.values())
    second = engine_of(
        model, settings_of(stages[1], precisions[1], **(CPU if stages[1] else {})), optimizer=adamw(model)
    )
    for name, weight in masters_of(second).items():
        assert torch.equal(weight, before[name]), name
    wanted = torch.bfloat16 if precisions[1] == "bf16" else torch.float32
    assert {p.dtype for p in model.parameters()} == {wanted}
    train(second, 1)
    assert any(not torch.equal(weight, before[name]) for name, weight in masters_of(second).items())


@pytest.mark.parametrize("stages", [(0, 3), (1, 0), (2, 1), (3, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("precisions", [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16")], ids=str)
def test_masters_lose_nothing(ranks: Any, stages: tuple[int, int], precisions: tuple[str, str]) -> None:
    check_masters(stages, precisions)
    ranks.run(check_masters, 2, stages, precisions)


def check_destroy(stage: int, precision: str) -> None:
    model = make()
    engine = engine_of(model, settings_of(stage, precision), optimizer=adamw(model))
    train(engine, 2)
    dtype = engine.precision.dtype
    weights = {name: value.to(dtype) for name, value in masters_of(engine).items()}
    zero = engine.zero
    held = [
        weakref.ref(tensor) for b in zero.buckets for tensor in (b.values, b._master, b.grads) if tensor is not None
    ]
    buckets = list(zero.buckets)
    engine.destroy()
    engine.destroy()  # nothing more to let go
    assert [ref() for ref in held] == [None] * len(held) and not zero.buckets  # at once, though both are still held
    assert all(b.values is None and b._shard is None and b._reduced is None for b in buckets)
    with pytest.raises(ConfigError, match=r"let go by engine.destroy\(\)"):
        engine(batch_of(0)[0])
    assert engine.optimizer is None and engine.get_lr() == []
    if stage == 3 and engine.world_size > 1:
        assert all(p.isnan().all() and slice_of(p) is not None for p in model.parameters())
    else:
        assert_ordinary(model)
    for name, parameter in model.named_parameters():
        with GatheredParameters(parameter):
            assert torch.equal(parameter, weights[name].to(parameter)), name
    again = engine_of(model, settings_of(1, precision), optimizer=adamw(model))
    for name, value in masters_of(again).items():
        assert torch.equal(value, weights[name].float()), name


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_destroy_gives_the_module_back(ranks: Any, stage: int, precision: str) -> None:
    check_destroy(stage, precision)
    ranks.run(check_destroy, 2, stage, precision)


def freeze(model: nn.Module) -> None:
    model.blocks.requires_grad_(False)


def unfreeze(model: nn.Module) -> None:
    model.requires_grad_(True)


def check_freezing(stage: int) -> None:
    """Progressive unfreezing, with the same optimizer object at last."""
    model, engine = make(), None
    for phase, change in enumerate((lambda model: None, freeze, unfreeze)):
        change(model)
        engine = engine_of(model, settings_of(stage), optimizer=adamw(model))
        train(engine, 2, first=2 * phase)
    assert engine is not None
    assert_like(engine, plain_phases(freeze, unfreeze))


@pytest.mark.parametrize("stage", range(4))
def test_unfrozen_in_between(ranks: Any, stage: int) -> None:
    ranks.run(check_freezing, 2, stage)


def check_same_optimizer(stage: int) -> None:
    model = make()
    optimizer = adamw(model)
    for phase in range(2):
        engine = engine_of(model, settings_of(stage), optimizer=optimizer)
        train(engine, 2, first=2 * phase)
    assert_like(engine, plain_phases(lambda model: None))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_same_optimizer_starts_anew(ranks: Any, stage: int) -> None:
    ranks.run(check_same_optimizer, 2, stage)


def check_inference(stage: int) -> None:
    """An engine without an optimizer, one with, another without."""
    model = make()
    wanted = make()(batch_of(0)[0])
    asked = engine_of(model, settings_of(stage))
    torch.testing.assert_close(asked(batch_of(0)[0]), wanted)
    engine = engine_of(model, settings_of(stage), optimizer=adamw(model))
    train(engine, 2)
    assert_like(engine, plain_phases())
    asked = megazero.init_inference(model, zero={"stage": stage})
    torch.testing.assert_close(asked(batch_of(0)[0]), plain_phases()(batch_of(0)[0]))
    with pytest.raises(ConfigError, match=r"let go by init_inference\(\)"):
        engine.step()


@pytest.mark.parametrize("stage", [0, 3])
def test_for_inference_before_and_after(ranks: Any, stage: int) -> None:
    check_inference(stage)
    ranks.run(check_inference, 2, stage)


class Shares(nn.Module):
    """A head over a frozen body that it shares with others."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def test_engines_may_share_what_is_frozen() -> None:
    """Both go on: nothing of the body is handled by either."""
    body = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    models = [Shares(body), Shares(body)]
    engines = [engine_of(model, settings_of(1), optimizer=adamw(model)) for model in models]
    for engine in engines:
        before = engine.module.head.weight.detach().clone()
        engine.backward(engine(batch_of(0)[0]).square().mean())
        engine.step()
        assert not torch.equal(engine.module.head.weight, before)


def check_parts() -> None:
    """Two engines' modules become parts of a third's."""
    parts = [make(), make()]
    engines = [
        engine_of(part, settings_of(stage), optimizer=adamw(part)) for part, stage in zip(parts, (1, 3), strict=True)
    ]
    for engine in engines:
        train(engine, 2)
    both = nn.ModuleList(parts)
    engine = engine_of(both, settings_of(2), optimizer=adamw(both))
    found, wanted = masters_of(engine), plain_phases().state_dict()
    assert set(found) == {f"{part}.{name}" for part in range(2) for name in wanted}
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name.partition(".")[2]], rtol=0, atol=2e-5)
    for engine in engines:
        with pytest.raises(ConfigError, match="let go by"):
            engine.step()


def test_parts_of_another_model(ranks: Any) -> None:
    ranks.run(check_parts, 2)


def check_held() -> None:
    model = make()
    engine = engine_of(model, settings_of(3), optimizer=adamw(model))
    with GatheredParameters(list(model.parameters())), pytest.raises(ConfigError, match="held by a GatheredParameters"):
        engine.destroy()
    train(engine, 2)  # nothing has happened
    assert_like(engine, plain_phases())


def test_not_while_parameters_are_held(ranks: Any) -> None:
    ranks.run(check_held, 2)


def test_a_configuration_that_is_refused_leaves_the_engine() -> None:
    model = make()
    engine = engine_of(model, settings_of(1), optimizer=adamw(model))
    with pytest.raises(ConfigError):
        engine_of(model, settings_of(7))
    train(engine, 2)
    assert_like(engine, plain_phases())


def check_tensor_parallel(stage: int) -> None:
    """The layers stay split: the same tp again, or an error that leaves the engine."""
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(1))
    model, plain = hf_model("gpt2"), hf_model("gpt2")
    for _ in range(2):
        settings = settings_of(stage) | {"tensor_parallel": {"autotp_size": 2}}
        engine = engine_of(model, settings, optimizer=adamw(model))
        optimizer = adamw(plain)
        for _ in range(2):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            optimizer.zero_grad()
            plain(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        with pytest.raises(ConfigError, match=r"are this rank's parts: an earlier engine.*Use its tp_size again"):
            engine_of(model, settings_of(stage), optimizer=adamw(model))
        assert_like(engine, plain)


@pytest.mark.parametrize("stage", [0, 1])
def test_split_layers_stay_split(ranks: Any, stage: int) -> None:
    ranks.run(check_tensor_parallel, 2, stage)


def check_experts(stage: int) -> None:
    """Spread experts: 2 steps, 2 more, against one engine that makes the same steps with a new optimizer."""
    model = moe.spread(2, dist.get_rank())
    for stage_now in (stage, 3 - stage):
        engine = moe.engine_of(model, moe.config_of(stage_now))
        found = moe.train(engine, 2, first=0)
    plain = moe.fill(moe.Model(1))
    for _ in range(2):
        optimizer = torch.optim.AdamW(plain.parameters(), lr=moe.LR, eps=moe.EPS)
        for step in range(2):
            parts = [part for of_rank in moe.parts_of(step, 2, 1) for part in of_rank]
            optimizer.zero_grad()
            torch.stack([plain(*part) for part in parts]).mean().backward()
            optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found.weights[name], parameter.detach(), rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_spread_experts_again(ranks: Any, stage: int) -> None:
    ranks.run(check_experts, 2, stage)
