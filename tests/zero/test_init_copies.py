"""Modules that are built in slices: copied (torch's own TransformerEncoder is made of copies), and run without an
engine."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import megazero
from megazero.base.errors import ConfigError
from megazero.zero import GatheredParameters, Init
from megazero.zero import init as init_module
from megazero.zero.init import slice_of


def encoder() -> nn.Module:
    """Its two layers are deep copies of one that was built before; each is larger than what may be whole at once."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layer.norm1.weight.requires_grad_(False)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def check_clones() -> None:
    plain = encoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init_module, "LIVE_ELEMENTS", 600)
        with Init():
            model = encoder()
            whole = sum(p.numel() for p in model.parameters() if slice_of(p) is None)
            assert whole <= 600 + 2 * 16 * 32  # what was copied is cut in its turn
    assert all(slice_of(p) is not None for p in model.parameters())
    later = copy.deepcopy(model)  # of slices, slices
    for module in (model, later):
        with GatheredParameters(list(module.parameters())):
            for (name, made), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
                assert torch.equal(made, expected) and made.requires_grad == expected.requires_grad, name
    with GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a copy has its own
    with GatheredParameters(list(later.parameters())):
        inside = copy.deepcopy(later)
    assert all(slice_of(p) is None and not hasattr(p, "ds_id") for p in inside.parameters())
    assert all(map(torch.equal, inside.parameters(), plain.parameters()))

    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    engine = megazero.initialize(model=later, config=config)[0]
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(engine(x), plain(x), atol=1e-6)
    assert not any("__deepcopy__" in vars(p) or "__reduce_ex__" in vars(p) for p in later.parameters())


@pytest.mark.parametrize("size", [1, 2])
def test_clones_of_what_is_in_slices(ranks: Any, size: int) -> None:
    ranks.run(check_clones, size)


def check_pickle() -> None:
    with Init():
        model = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"shape \(4, 4\).* built under zero\.Init .*GatheredParameters"):
        pickle.dumps(model)
    with GatheredParameters(list(model.parameters())):
        loaded = pickle.loads(pickle.dumps(model))
    with GatheredParameters(list(model.parameters())):
        assert torch.equal(loaded.weight, model.weight)
    assert slice_of(loaded.weight) is None and not hasattr(loaded.weight, "ds_id")


def test_slices_are_not_pickled(ranks: Any) -> None:
    ranks.run(check_pickle, 2)


def check_run() -> None:
    with Init():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        model(torch.ones(1, 4))  # constructors do it
    x = torch.ones(1, 4)
    with pytest.raises(
        ConfigError, match=r"Linear was built under zero\.Init .* its weight and bias, .*initialize\(\)"
    ):
        model(x)
    with GatheredParameters(list(model.parameters())):
        assert torch.isfinite(model(x)).all()
    nn.Linear(4, 4)(x)  # others run
    engine = megazero.initialize(model=model, config={"train_batch_size": 2, "zero_optimization": {"stage": 3}})[0]
    assert torch.isfinite(engine(x)).all()
    assert all(slice_of(p) is None for p in model.parameters())


def test_a_module_in_slices_refuses_to_run(ranks: Any) -> None:
    ranks.run(check_run, 2)


def test_slices_elsewhere_do_not_hinder_compilation() -> None:
    with Init():
        sliced = nn.Linear(4, 4)
    other, x = nn.Linear(4, 2), torch.ones(1, 4)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    assert init_module._guard is not None and torch.equal(compiled(x), other(x))
    assert slice_of(sliced.weight) is not None
    del sliced
    gc.collect()
    other(x)
    assert init_module._guard is None or len(init_module._SLICES)  # other tests' models may live
