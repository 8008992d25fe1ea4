"""Spread experts in checkpoints and state dicts: names say which expert, whatever ranks hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megazero.engine.engine import Engine
from megazero.parallel.collectives import gather_objects
from megazero.parallel.expert import ExpertList
from tests.engine.moe import EXPERTS, Model, config_of, engine_of, spread, train
from tests.harness import Ranks

LIST = "blocks.1.moe.deepspeed_moe.experts.deepspeed_experts"


def build(ep: int, stage: int, precision: str = "fp32", **more: Any) -> Engine:
    """With a buffer of each expert that tells which it is."""
    model = spread(ep, dist.get_rank() if dist.is_initialized() else 0)
    if precision != "fp32":
        more[precision] = {"enabled": True}
    engine = engine_of(model, config_of(stage, 1, 0.5, **more))
    for part in engine.module.modules():
        if isinstance(part, ExpertList):
            for number in part.numbers:
                part[number].gain.fill_(1 + number / 8)
    return engine


def whole_sections(engine: Engine) -> dict[str, Tensor]:
    """Masters and optimizer states by name, on every rank; each element is held by one."""
    mine = [(p.name, p.shape, p.box, p.tensor.clone()) for s in engine.pieces(for_save=True).values() for p in s]
    found: dict[str, Tensor] = {}
    for of_rank in gather_objects(mine, engine.topology.group("world")):
        for name, shape, box, tensor in of_rank:
            place = box.of(found.setdefault(name, torch.full(shape, torch.nan)))
            assert place.isnan().all(), f"{name} is saved twice"
            place.copy_(tensor)
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def check_save(folder: Path, ep: int, stage: int) -> None:
    engine = build(ep, stage)
    train(engine, 2)
    engine.save_checkpoint(folder, "a")
    found = whole_sections(engine)
    train(engine, 1, first=2)
    later = whole_sections(engine)
    if engine.global_rank == 0:
        torch.save((found, later), folder / "wanted.pt")


def check_load(folder: Path, ranks: int, ep: int, stage: int) -> None:
    """What `ranks` ranks saved."""
    engine = build(ep, stage)
    for part in engine.module.modules():
        if isinstance(part, ExpertList):
            for expert in part:
                expert.gain.zero_()
    assert engine.load_checkpoint(folder, "a")[0] is not None
    saved, later = torch.load(folder / "wanted.pt")
    found = whole_sections(engine)
    assert found.keys() == saved.keys() and len(saved) == 3 * len(list(Model(1).parameters()))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())
    for part in engine.module.modules():
        if isinstance(part, ExpertList):
            assert [float(part[number].gain) for number in part.numbers] == [1 + n / 8 for n in part.numbers]
    train(engine, 1, first=2)
    if engine.dp_world_size == ranks:  # the balancing loss is of each rank's own tokens
        for name, tensor in whole_sections(engine).items():
            torch.testing.assert_close(tensor, later[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((4, 4, 2), [(4, 1, 0), (4, 2, 3), (2, 2, 3), (1, 1, 1)]),
        ((4, 1, 3), [(4, 4, 2), (2, 2, 0)]),
        ((4, 2, 0), [(4, 4, 3), (4, 1, 1)]),
        ((1, 1, 0), [(4, 2, 2)]),
    ],
)
def test_other_layouts_load_it_bitwise(
    ranks: Ranks, tmp_path: Path, saved: tuple[int, int, int], loaded: list[tuple[int, int, int]]
) -> None:
    ranks.run(check_save, saved[0], tmp_path, *saved[1:])
    for size, ep, stage in loaded:
        ranks.run(check_load, size, tmp_path, saved[0], ep, stage)


def check_state_dict(ep: int, stage: int, precision: str) -> None:
    engine = build(ep, stage, precision)
    train(engine, 1)
    world, state = engine.topology.group("world"), engine.state_dict()
    assert list(state) == list(Model(1).state_dict())
    assert [float(state[f"{LIST}.{n}.gain"]) for n in range(EXPERTS)] == [1 + n / 8 for n in range(EXPERTS)]
    everywhere = gather_objects({k: v.clone() for k, v in state.items()}, world)
    whole = gather_objects(engine.consolidated_state_dict(), world)[0]
    for of_rank in everywhere:
        assert of_rank.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in of_rank.items())

    other = engine_of(spread(2 if ep == 4 else 4, world.rank), config_of((stage + 2) % 4))
    assert not any(other.load_state_dict({k: v.float() for k, v in whole.items()}))
    again = other.state_dict()
    assert all(torch.equal(value.float(), whole[name].float()) for name, value in again.items())
    del whole[f"{LIST}.3.up.weight"]
    if not list(other.module.blocks)[1].moe.deepspeed_moe.experts.deepspeed_experts.numbers.count(3):
        other.load_state_dict(whole)  # another rank's
    else:
        with pytest.raises(RuntimeError, match=r"Missing key.*deepspeed_experts\.3\.up\.weight"):
            other.load_state_dict(whole)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*deepspeed_experts\.4\.up\.weight"):
        other.load_state_dict(again | {f"{LIST}.4.up.weight": again[f"{LIST}.0.up.weight"]})


@pytest.mark.parametrize(("ep", "stage", "precision"), [(4, 0, "fp32"), (2, 1, "bf16"), (2, 3, "fp32"), (4, 3, "bf16")])
def test_state_dicts_hold_all_experts_on_every_rank(ranks: Ranks, ep: int, stage: int, precision: str) -> None:
    ranks.run(check_state_dict, 4, ep, stage, precision)


def check_frozen(folder: Path, stage: int) -> None:
    """Experts that are not trained: in checkpoints, in whole state dicts, and nowhere in the optimizer."""
    model = spread(2, dist.get_rank())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    wanted = {name: value.clone() for name, value in spread(1, 0, built=False).state_dict().items()}
    engine = engine_of(model, config_of(stage))
    train(engine, 1)
    engine.save_checkpoint(folder, "a")
    whole = gather_objects(engine.consolidated_state_dict(), engine.topology.group("world"))[0]
    experts = [name for name in whole if "experts" in name]
    assert len(experts) == 2 * EXPERTS * 5 and whole.keys() == wanted.keys()
    assert all(torch.equal(whole[name], wanted[name]) for name in experts)
    other = engine_of(Model(4), config_of(3))
    other.load_checkpoint(folder, "a", load_module_only=True)
    again = gather_objects(other.consolidated_state_dict(), engine.topology.group("world"))[0]
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_frozen_experts(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    ranks.run(check_frozen, 4, tmp_path, stage)
