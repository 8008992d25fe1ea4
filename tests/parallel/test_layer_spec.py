"""Specs of layers and their cut into stages by each method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megazero import LayerSpec
from megazero.base.errors import ConfigError
from megazero.parallel.layer_spec import partition


def test_a_spec_takes_a_class() -> None:
    with pytest.raises(ConfigError, match="takes a class of torch"):
        LayerSpec(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="takes a class of torch"):
        LayerSpec(torch.relu)


class Block(nn.Module):
    pass


class TestPartition:
    LAYERS = (*[LayerSpec(Block)] * 2, torch.relu, *[LayerSpec(Block)] * 3, torch.tanh, LayerSpec(nn.Linear, 1, 1))
    PARAMETERS = (10, 10, 0, 10, 10, 10, 0, 50)

    @pytest.mark.parametrize(
        ("method", "stages", "sizes"),
        [
            ("cost", 2, [6, 2]),
            ("parameters", 2, [7, 1]),
            ("uniform", 3, [3, 3, 2]),
            ("type:block", 5, [1, 1, 2, 1, 3]),
            ("type:^LINEAR$", 1, [8]),
        ],
    )
    def test_methods(self, method: str, stages: int, sizes: list[int]) -> None:
        found = partition(method, self.LAYERS, self.PARAMETERS, stages)
        costs = {"type:block": [isinstance(layer, LayerSpec) and layer.cls is Block for layer in self.LAYERS]}
        if method in costs:  # several cuts are equally good
            ends = torch.tensor(found).cumsum(0).tolist()
            assert [sum(costs[method][a:b]) for a, b in zip([0, *ends], ends, strict=False)] == [1] * stages
        else:
            assert found == sizes

    @pytest.mark.parametrize(
        ("method", "stages", "said"),
        [
            ("cost", 9, "8 layers do not make 9 stages: each holds at least one. Use at most 8"),
            ("profile", 2, "partition_method 'profile' is none of cost, parameters, uniform, type:<regex>"),
            ("type:attention", 2, "finds 0 of 8 layers for 2 stages: each needs one. Layers here: Block, Linear, relu"),
            ("type:linear", 2, "finds 1 of 8 layers for 2 stages"),
            ("type:(", 2, "Write a Python regular expression"),
        ],
    )
    def test_errors(self, method: str, stages: int, said: str) -> None:
        with pytest.raises(ConfigError) as caught:
            partition(method, self.LAYERS, self.PARAMETERS, stages)
        assert said in str(caught.value)
