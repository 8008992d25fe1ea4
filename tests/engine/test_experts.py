"""Experts spread over ranks by initialize(): the numbers of one process, at every stage and with what goes with it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megazero.engine.engine import Engine
from megazero.parallel.collectives import all_reduce
from megazero.parallel.expert import ExpertList
from megazero.parallel.topology import Topology
from megazero.zero.context import Init
from tests.engine.moe import (
    EXPERTS,
    LR,
    Expert,
    Model,
    assert_alike,
    config_of,
    engine_of,
    fill,
    parts_of,
    plain,
    spread,
    train,
    weights_of,
    whole_gradients,
)
from tests.harness import Ranks


def check_parity(ep: int, stage: int, accumulation: int, clip: float, built: bool, settings: dict[str, Any]) -> None:
    topology = Topology.build()
    moe = {} if built else {"moe": {"enabled": True, "ep_size": ep}}
    model = spread(ep, topology.rank, built, **settings)
    engine = engine_of(model, config_of(stage, accumulation, clip, **moe))
    assert engine.topology.size("ep") == ep == engine.settings.parallel.expert_model_parallel_size
    found = train(engine)
    assert_alike(found, plain(topology.world_size, accumulation, clip, **settings))


LAYOUTS = [
    # ranks, ep, stage, micro-batches, clip, whether the layer says ep (or the configuration)
    (2, 2, 0, 1, 0.0, True),
    (2, 2, 1, 2, 0.5, False),
    (2, 2, 2, 1, 0.5, True),
    (2, 2, 3, 2, 0.0, False),
    (4, 1, 2, 1, 0.5, True),
    (4, 2, 0, 2, 0.5, False),
    (4, 2, 1, 1, 0.5, True),
    (4, 2, 2, 2, 0.5, False),
    (4, 2, 3, 2, 0.5, True),
    (4, 4, 0, 1, 0.5, True),
    (4, 4, 1, 2, 0.0, True),
    (4, 4, 2, 2, 0.5, False),
    (4, 4, 3, 1, 0.5, True),
]


@pytest.mark.parametrize(("size", "ep", "stage", "accumulation", "clip", "built"), LAYOUTS)
def test_equals_one_process(
    ranks: Ranks, size: int, ep: int, stage: int, accumulation: int, clip: float, built: bool
) -> None:
    ranks.run(check_parity, size, ep, stage, accumulation, clip, built, {})


TIGHT = {"drop_tokens": True, "capacity_factor": 0.7, "min_capacity": 1}


@pytest.mark.parametrize(
    "settings",
    [TIGHT, {**TIGHT, "k": 1, "use_rts": False}, {"use_residual": True, "k": 3}, {"blocks": 1}],
    ids=["dropping", "dropping, k=1", "residual, k=3", "one layer: each expert is a unit"],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_layers_of_other_settings(ranks: Ranks, stage: int, settings: dict[str, Any]) -> None:
    """What is dropped is what each rank's own tokens have no room for, spread or not."""
    ranks.run(check_parity, 4, 2, stage, 1, 0.5, True, settings)


# faults that these comparisons must see


def reduced_over_all(engine: Engine) -> None:
    """Gradients of different experts are added up."""
    reduction = engine.zero.reduction
    finish = reduction.finish

    def too_much() -> None:
        finish()
        for bucket in reduction.buckets:
            if bucket.group.axis == "expert_dp":
                all_reduce(bucket.reduced, engine.topology.group("ep"))

    reduction.finish = too_much  # type: ignore[method-assign]


def mean_over_copies(engine: Engine) -> None:
    """Gradients of experts are divided by the number of copies, not by that of ranks."""
    reduction = engine.zero.reduction
    finish = reduction.finish

    def too_large() -> None:
        finish()
        for bucket in reduction.buckets:
            if bucket.group.axis == "expert_dp":
                bucket.reduced.mul_(engine.topology.size("ep"))

    reduction.finish = too_large  # type: ignore[method-assign]


def rows_of_another_rank(engine: Engine) -> None:
    """Rows come back to the wrong rank's place."""
    experts = next(part for part in engine.module.modules() if isinstance(part, ExpertList))
    back = experts.to_owners
    experts.to_owners = lambda rows: back(rows.roll(rows.shape[1] // 2, 1))  # type: ignore[method-assign]


def norm_counts_twice(engine: Engine) -> None:
    """As if each copy of an expert counted itself."""
    zero = engine.zero
    norm = zero.norm_squared

    def too_large() -> Tensor:
        of_experts = [b.reduced for b in zero.buckets if b.group.axis == "expert_dp"]
        return norm() + sum(part.double().square().sum() for part in of_experts)

    zero.norm_squared = too_large  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Engine], None]] = {
    fault.__name__: fault for fault in (reduced_over_all, mean_over_copies, rows_of_another_rank, norm_counts_twice)
}


def check_fault(name: str | None) -> None:
    engine = engine_of(spread(2, dist.get_rank()), config_of(2, 1, 0.5))
    if name is not None:
        FAULTS[name](engine)
        with pytest.raises(AssertionError):
            assert_alike(train(engine), plain(4, 1, 0.5))
    else:
        assert_alike(train(engine), plain(4, 1, 0.5))


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_a_fault_is_seen(ranks: Ranks, name: str | None) -> None:
    ranks.run(check_fault, 4, name)


# what a script has beside the model


def seed_groups(model: nn.Module, kind: str) -> list[dict[str, Any]]:
    """Dense parameters and those of experts, made before the model knows its ranks."""
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    dense = [p for name, p in model.named_parameters() if ".experts." not in name]
    if kind == "overlapping":  # as the block of the document makes them
        dense = [*dense, *experts]
    return [{"params": dense, "name": "parameters"}, {"params": experts, "moe": True, "name": "moe_parameters"}]


def check_groups(given: str, built: bool) -> None:
    model = spread(4, dist.get_rank(), built)
    config = config_of(1, moe_expert_parallel_size=4)
    groups = seed_groups(model, given)
    arguments: dict[str, Any] = {"model_parameters": groups}
    if given == "optimizer":
        arguments = {"optimizer": torch.optim.AdamW(groups, lr=LR, eps=config["optimizer"]["params"]["eps"])}
        del config["optimizer"]
    elif given == "callable":
        arguments |= {"optimizer": lambda params: torch.optim.AdamW(params, **config_of(1)["optimizer"]["params"])}
    engine = engine_of(model, config, **arguments)
    assert engine.optimizer is not None
    sizes = {group["name"]: sum(p.numel() for p in group["params"]) for group in engine.optimizer.param_groups}
    expert = sum(p.numel() for p in Expert().parameters())
    assert sizes["moe_parameters"] == 2 * expert  # one of each layer, and one copy of it
    if not built:
        assert sum(p.numel() for p in groups[1]["params"]) == 2 * expert  # the others' memory is free
    assert_alike(train(engine), plain(4))


@pytest.mark.parametrize("built", [True, False], ids=["layer", "configuration"])
@pytest.mark.parametrize("given", ["groups", "overlapping", "optimizer", "callable"])
def test_groups_and_optimizers_that_were_made_before(ranks: Ranks, given: str, built: bool) -> None:
    ranks.run(check_groups, 4, given, built)


def check_init(built: bool) -> None:
    """Under Init ranks cannot differ: each holds rank 0's experts until they are spread."""
    with Init():
        model = fill(Model(2), 0, 2) if built else fill(Model(1))
    engine = engine_of(model, config_of(3, moe={"ep_size": 2}))
    wanted = fill(Model(2), 0, 2) if built else fill(Model(1))
    start = weights_of(engine)
    for name, value in wanted.named_parameters():
        assert torch.equal(start[name], value), name
    if built:
        first, other = (f"blocks.1.moe.deepspeed_moe.experts.deepspeed_experts.{n}.up.weight" for n in (1, 3))
        assert torch.equal(start[first], start[other])
        like = engine_of(fill(Model(2), 0, 2), config_of(2, moe={"ep_size": 2}))
        assert_alike(train(engine), train(like))
    else:
        assert_alike(train(engine), plain(4))


@pytest.mark.parametrize("built", [True, False], ids=["layer", "configuration"])
def test_models_built_under_init(ranks: Ranks, built: bool) -> None:
    ranks.run(check_init, 4, built)


def check_offload(folder: Path, stage: int, device: str) -> None:
    home = {"device": device, "nvme_path": str(folder)} if device == "nvme" else {"device": device}
    config = config_of(stage, 2, 0.5)
    config["zero_optimization"]["offload_optimizer"] = home
    if stage == 3:
        config["zero_optimization"]["offload_param"] = home
    assert_alike(train(engine_of(spread(2, dist.get_rank()), config)), plain(4, 2, 0.5))


@pytest.mark.parametrize(("stage", "device"), [(1, "cpu"), (2, "nvme"), (3, "cpu"), (3, "nvme")])
def test_offload(ranks: Ranks, tmp_path: Path, stage: int, device: str) -> None:
    ranks.run(check_offload, 4, tmp_path, stage, device)


class Recomputed(Model):
    reentrant = False

    def run(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = checkpoint(block, x, use_reentrant=self.reentrant)
        return made


class Reentrant(Recomputed):
    reentrant = True


def check_recompute(kind: type[Model], stage: int, ep: int) -> None:
    assert_alike(train(engine_of(spread(ep, dist.get_rank(), kind=kind), config_of(stage, 2, 0.5))), plain(4, 2, 0.5))


@pytest.mark.parametrize("kind", [Recomputed, Reentrant])
@pytest.mark.parametrize(("stage", "ep"), [(1, 2), (2, 2), (3, 2), (3, 4)])
def test_recomputed_layers(ranks: Ranks, kind: type[Model], stage: int, ep: int) -> None:
    ranks.run(check_recompute, 4, kind, stage, ep)


def check_counts(stage: int, settings: dict[str, Any]) -> None:
    """Ranks with other numbers of tokens, none of them included; each loss counts by its samples."""
    rank, sizes = dist.get_rank(), [3, 1, 6, 4]
    x, target = parts_of(0, 1, 1)[0][0]
    starts = [sum(sizes[:r]) for r in range(5)]
    parts = [(x[a:b], target[a:b]) for a, b in pairwise(starts)]
    engine = engine_of(spread(2, rank, **settings), config_of(stage))
    engine.backward(engine(*parts[rank]), count=sizes[rank])
    found = whole_gradients(engine)
    model = fill(Model(1, **settings))
    loss = sum(model(*part) * n for part, n in zip(parts, sizes, strict=True)) / sum(sizes)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("settings", [{}, TIGHT], ids=["all tokens", "dropping"])
def test_ranks_with_other_numbers_of_tokens(ranks: Ranks, settings: dict[str, Any]) -> None:
    ranks.run(check_counts, 4, 2, settings)


def check_eval(stage: int) -> None:
    engine = engine_of(spread(2, dist.get_rank()), config_of(stage))
    model = fill(Model(1))
    made: list[Any] = []
    for whole in (engine.module, model):
        whole.blocks[0].moe.register_forward_hook(lambda module, args, output: made.append(output))
    for training in (False, True):  # stage 3 has gathered in eval before it trains
        engine.train(training), model.train(training)
        part = parts_of(5, 4, 1)[dist.get_rank()][0]
        with torch.no_grad():
            torch.testing.assert_close(engine(*part), model(*part), rtol=1e-6, atol=0)
        (_, balance, counts), (_, wanted, counted) = made[-2:]
        assert torch.equal(counts, counted) and counts.shape == (EXPERTS,)
        torch.testing.assert_close(balance, wanted, rtol=1e-6, atol=0)  # of this rank's tokens
    assert_alike(train(engine), plain(4))


@pytest.mark.parametrize("stage", [0, 3])
def test_eval_and_no_grad(ranks: Ranks, stage: int) -> None:
    ranks.run(check_eval, 4, stage)


def check_16_bits(precision: str, stage: int) -> None:
    """Against every rank having all experts, whose rounding is the same but for the order of sums."""
    more = {precision: {"enabled": True, **({"initial_scale_power": 10} if precision == "fp16" else {})}}
    runs = []
    for ep in (1, 2):
        engine = engine_of(spread(ep, dist.get_rank()), config_of(stage, 2, 0.5, **more))
        runs.append(train(engine, steps=2))
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=2e-3)
    assert runs[0].norms == pytest.approx(runs[1].norms, rel=2e-2)
    for name, gradient in runs[1].gradients.items():
        off = (gradient - runs[0].gradients[name]).norm()
        assert off <= 3e-2 * runs[0].gradients[name].norm() + 1e-3 * runs[0].norms[0], name


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 1), ("bf16", 3), ("fp16", 2)])
def test_16_bits(ranks: Ranks, precision: str, stage: int) -> None:
    ranks.run(check_16_bits, 4, precision, stage)


def check_whole_matrices(kind: str, stage: int) -> None:
    """Optimizers that need whole parameters find them among the ranks with copies."""
    named = {"type": kind, "params": {"lr": 1e-3}}
    rank = dist.get_rank()
    runs = [train(engine_of(spread(ep, rank), config_of(stage, optimizer=named))) for ep in (1, 2, 4)]
    for other in runs[1:]:
        for name, weight in other.weights.items():
            torch.testing.assert_close(weight, runs[0].weights[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(("kind", "stage"), [("Lamb", 0), ("Lamb", 2), ("Muon", 1), ("Muon", 3)])
def test_optimizers_of_whole_matrices(ranks: Ranks, kind: str, stage: int) -> None:
    ranks.run(check_whole_matrices, 4, kind, stage)


class Spare(Model):
    """Each expert has a parameter that only the experts 2 and 3 use."""

    def __init__(self, ep_size: int, **settings: Any) -> None:
        super().__init__(ep_size, **settings)
        for part in list(self.modules()):
            if isinstance(part, Expert):
                part.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = super().forward(x, target)
        for part in self.modules():
            if isinstance(part, ExpertList):
                loss = loss + sum(part[number].spare.square().sum() for number in part.numbers if number > 1)
        return loss


def check_unused(stage: int) -> None:
    model = Spare(2)
    engine = engine_of(model, config_of(stage))
    train(engine, 2)
    for name, value in weights_of(engine).items():
        if name.endswith("spare"):
            assert torch.equal(value, torch.ones(3)) == (name.split(".")[-2] in "01"), name


@pytest.mark.parametrize("stage", [0, 2])
def test_a_parameter_that_no_copy_uses_stays(ranks: Ranks, stage: int) -> None:
    ranks.run(check_unused, 4, stage)
