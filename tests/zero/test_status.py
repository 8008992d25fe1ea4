"""ds_id, ds_status, ds_shape and ds_numel as scripts ask for them, at every stage and after Init; GatheredParameters of
what those scripts hand it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megazero
from megazero.zero import GatheredParameters, Init, ZeroParamStatus
from megazero.zero import init as init_module
from megazero.zero.init import slice_of
from tests.zero.test_stages import Blocks, loss_of, make

NAMES = ("ds_id", "ds_status", "ds_shape", "ds_numel")


def engine_of(model: nn.Module, stage: int, small: int = 0, **zero: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": small, **zero},
    }
    return megazero.initialize(model=model, config=settings)[0]


def maybe_zero_3(parameter: Any) -> Tensor:
    """As in many fine-tuning scripts, which save what this gives."""
    if hasattr(parameter, "ds_id"):
        assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        with GatheredParameters([parameter]):
            return parameter.data.detach().cpu().clone()
    return parameter.detach().cpu().clone()


def check_saved(stage: int, small: int, built_in_slices: bool) -> None:
    wanted = dict(make(Blocks).named_parameters())
    if built_in_slices:
        with Init():
            model = make(Blocks)
    else:
        model = make(Blocks)
    model.blocks[0].up.weight.requires_grad_(False)
    engine = engine_of(model, stage, small)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(maybe_zero_3(parameter), wanted[name]), name
        sharded = stage == 3 and parameter.numel() >= small
        assert hasattr(parameter, "ds_id") == hasattr(parameter, "ds_status") == sharded, name
        if stage == 3:  # as scripts read them of every parameter
            assert (parameter.ds_shape, parameter.ds_numel) == (wanted[name].shape, wanted[name].numel())
        else:
            assert not any(hasattr(parameter, each) for each in NAMES), name
    numbers = [p.ds_id for p in model.parameters() if hasattr(p, "ds_id")]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("built_in_slices", [False, True])
@pytest.mark.parametrize(("stage", "small"), [(0, 0), (1, 0), (2, 0), (3, 0), (3, 40)])
def test_scripts_save_whole_weights(ranks: Any, stage: int, small: int, built_in_slices: bool) -> None:
    ranks.run(check_saved, 2, stage, small, built_in_slices)


def check_one_rank() -> None:
    with Init():
        model = make(Blocks)
    assert all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    engine = engine_of(model, 3)
    assert all(not hasattr(p, "ds_id") and p.ds_numel == p.numel() and p.isfinite().all() for p in model.parameters())
    engine_of(engine.module, 3)


def test_one_rank_has_all_of_them_whole(ranks: Any) -> None:
    ranks.run(check_one_rank, 1)


def check_status() -> None:
    model = make(Blocks)
    seen: dict[str, ZeroParamStatus] = {}
    weight, other = model.blocks[1].up.weight, model.blocks[2].up.weight
    engine = engine_of(model, 3, stage3_prefetch_bucket_size=0)

    def look(name: str) -> Any:
        return lambda *_: seen.update({name: weight.ds_status, f"other {name}": other.ds_status})

    model.blocks[1].up.register_forward_hook(look("forward"))
    model.blocks[1].up.register_full_backward_hook(look("backward"))
    whole, sharded = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE
    number = weight.ds_id
    for _ in range(2):
        engine.backward(loss_of(engine, dist.get_rank(), 0, 0))
        assert seen == {"forward": whole, "other forward": sharded, "backward": whole, "other backward": sharded}
        assert weight.ds_status is other.ds_status is sharded
        engine.step()
        assert weight.ds_status is other.ds_status is sharded and weight.ds_id == number
        seen.clear()
    with GatheredParameters(weight):
        assert weight.ds_status is whole and weight.isfinite().all()
    assert weight.ds_status is sharded and weight.isnan().all()


def test_status_follows_the_values(ranks: Any) -> None:
    ranks.run(check_status, 2)


def check_init() -> None:
    rank = dist.get_rank()
    before, init_module.LIVE_ELEMENTS = init_module.LIVE_ELEMENTS, 0
    try:
        with Init():
            model = make(Blocks)
            first = model.blocks[0].up.weight  # read, so whole, until another one is
            with GatheredParameters(first, modifier_rank=1), torch.no_grad():
                first.fill_(4.0 + rank)
                assert model.blocks[0].up.weight is first and (first == 4.0 + rank).all()
            assert model.blocks[0].down.weight.ds_status is ZeroParamStatus.AVAILABLE
            assert first.ds_status is ZeroParamStatus.NOT_AVAILABLE
            with GatheredParameters(first, modifier_rank=0), torch.no_grad():
                assert model.blocks[0].up.weight is first  # read, while the block holds it
                first.add_(1.0 + rank)
    finally:
        init_module.LIVE_ELEMENTS = before
    plain = make(Blocks)
    names = {p: name for name, p in model.named_parameters()}
    with GatheredParameters(set(model.parameters())):  # whatever the order in which they come on a rank
        for p, name in names.items():
            assert p.ds_status is ZeroParamStatus.AVAILABLE
            assert torch.equal(p, torch.full_like(p, 6.0) if p is first else plain.get_parameter(name)), name
    assert all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE and p.isnan().all() for p in model.parameters())
    weight, second = model.blocks[1].up.weight, model.blocks[1].down.weight
    with GatheredParameters([weight, second], modifier_rank=0), torch.no_grad():
        second.fill_(7.0 + rank)
        with GatheredParameters([weight, second], modifier_rank=1):
            assert (second == 7.0 + rank).all(), "what the outer block has changed is still there"
            weight.fill_(2.0 + rank)
            second.fill_(9.0 + rank)
        assert (weight == 3.0).all() and (second == 10.0).all()
        with GatheredParameters(weight):
            assert (weight == 3.0).all()
        assert weight.ds_status is ZeroParamStatus.AVAILABLE
    with GatheredParameters([weight, second]):
        assert (weight == 3.0).all() and (second == 10.0).all()
    with GatheredParameters(weight, modifier_rank=0):
        weight.data = torch.full((3, 5), 1.0 + rank)  # another shape from now on
    assert weight.ds_shape == weight.shape == (3, 5) and slice_of(weight).numel == weight.ds_numel == 15
    with GatheredParameters(weight):
        assert torch.equal(weight, torch.ones(3, 5))


def test_after_init(ranks: Any) -> None:
    ranks.run(check_init, 2)


def test_gathers_what_is_given(ranks: Any) -> None:
    layer = nn.Linear(4, 4, bias=False)
    for given in (None, [], [layer.weight, layer.bias], [None], layer.weight.detach(), [layer.weight.detach()]):
        with GatheredParameters(given):  # type: ignore[arg-type]
            pass
    with GatheredParameters([layer.weight, layer.bias]), torch.no_grad():
        layer.weight.fill_(2.0)  # nobody's but the script's: it keeps the change
    assert (layer.weight == 2.0).all() and not any(hasattr(layer.weight, name) for name in NAMES)
    with pytest.raises(ValueError, match=r"takes parameters, got 'weight' \(str\): pass .*module\.parameters\(\)"):
        GatheredParameters(layer.state_dict())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"(?s)takes parameters, got \('weight', Param.*\(tuple\)"):
        GatheredParameters(layer.named_parameters())  # type: ignore[arg-type]
