"""What initialize() and the optimizer that it returns refuse, each with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import megazero
from megazero.base.errors import ConfigError
from tests.engine.fronts import LR, Regressor, batch_of, config_of, engine_of, make
from tests.engine.test_initialize import BARE, adamw, halving


def test_refusals_about_parameters_and_optimizers() -> None:
    model, stranger = make(), make()
    with pytest.raises(ConfigError, match=r"lists 1 parameter more than once: head\.bias"):
        engine_of(model, config_of(), model_parameters=[*model.parameters(), model.head.bias])
    with pytest.raises(ConfigError, match=r"model_parameters holds a str\. Give model\.parameters\(\)"):
        engine_of(model, config_of(), model_parameters=["head"])
    with pytest.raises(ConfigError, match=r"model_parameters holds 8 parameters that are not the model's"):
        engine_of(model, config_of(), model_parameters=stranger.parameters())
    with pytest.raises(ConfigError, match=r"the optimizer holds 8 parameters that are not the model's, .*wrapping it"):
        engine_of(model, BARE, optimizer=adamw(stranger.parameters()))
    with pytest.raises(ConfigError, match=r"returned a int, not a torch\.optim\.Optimizer"):
        engine_of(model, BARE, optimizer=lambda params: 3)
    with pytest.raises(ConfigError, match=r"nothing to train: no parameter needs a gradient"):
        engine_of(make().requires_grad_(False), config_of())
    with pytest.raises(ConfigError, match=r"lr_scheduler without an optimizer"):
        engine_of(make(), BARE, lr_scheduler=halving)
    with pytest.raises(ConfigError, match=r"lr_scheduler=3 is neither a scheduler nor a function"):
        engine_of(make(), config_of(), lr_scheduler=3)
    stepped = make()
    used = adamw(stepped.parameters())
    stepped(*batch_of(0)).backward()
    used.step()
    with pytest.raises(ValueError, match=r"holds state of steps that it has made.*load_checkpoint"):
        engine_of(stepped, BARE, optimizer=used)
    with torch.device("meta"):
        empty = Regressor()
    with pytest.raises(ConfigError, match=r"8 parameters are on the meta device, blocks\.0\.weight.*zero\.Init\(\)"):
        engine_of(empty, config_of())
    with pytest.raises(ConfigError, match=r"2 parameters have no shape yet, 0\.weight .*Call the model on a batch"):
        engine_of(torch.nn.Sequential(torch.nn.LazyLinear(3)), config_of())


def test_what_the_returned_optimizer_refuses() -> None:
    engine, optimizer, _, _ = megazero.initialize(model=make(), config=config_of())
    with pytest.raises(ConfigError, match=r"optimizer\.step\(closure\) is not possible"):
        optimizer.step(lambda: None)
    with pytest.raises(ConfigError, match=r"add_param_group: shards are laid out when initialize"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(
        ConfigError, match=r"load_state_dict: this holds the state of whole parameters.*load_checkpoint"
    ):
        optimizer.load_state_dict({"state": {0: {}}, "param_groups": []})
    with pytest.raises(ConfigError, match=r"has 1 parameter groups, and 2 were stored"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{}, {}]})
    state = optimizer.state_dict()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.load_state_dict(state)  # as accelerate does
    assert engine.get_lr() == [LR]
    with pytest.raises(AttributeError, match=r"neither the engine's optimizer nor AdamW has 'nothing'"):
        _ = optimizer.nothing
    assert "AdamW" in repr(optimizer) and optimizer.defaults["betas"] == (0.9, 0.999)


def check_max_norm(precision: str) -> None:
    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(8, 4, max_norm=1.0)
            self.head = torch.nn.Linear(4, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(ids)).square().mean()

    config = config_of() | {"bf16": {"enabled": precision == "bf16"}}
    with pytest.raises(ConfigError, match=r"words has max_norm=1\.0(.|\n)*Set max_norm to None"):
        engine_of(Words(), config)
    frozen = Words()
    frozen.words.requires_grad_(False)
    engine_of(frozen, config)


def test_weights_that_their_forward_rewrites(ranks: Any) -> None:
    ranks.run(check_max_norm, 2, "fp32")
    ranks.run(check_max_norm, 1, "bf16")
    engine_of(torch.nn.Sequential(torch.nn.Embedding(8, 4, max_norm=1.0)), config_of())  # one rank, one copy
