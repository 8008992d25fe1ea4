"""Plans of what is split: matched by name, refused with what would work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megazero.base.errors import ConfigError
from megazero.engine.foreign import _check_ties, _shared
from megazero.parallel.foreign import Cut
from megazero.parallel.foreign_plan import plan_of
from tests.parallel.foreign_models import make


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))


def styles(model: nn.Module, ranks: int = 2, policy: Any = None) -> dict[str, str]:
    return {split.name: split.style for split in plan_of(model, policy, ranks).splits}


def test_a_model_brings_its_plan() -> None:
    found = styles(make("Qwen3"))
    assert found["model.layers.1.self_attn.q_proj"] == "colwise"
    assert found["model.layers.1.self_attn.o_proj"] == "rowwise"
    assert found["model.layers.0.self_attn.k_norm"] == "sum_gradients"
    assert found["lm_head"] == "colwise_gather_output" and found["model.embed_tokens"] == "whole"


def test_a_plan_inside_a_module_from_elsewhere() -> None:
    wrapped = nn.ModuleDict({"lm": make("Llama"), "head": nn.Linear(16, 1)})
    found = styles(wrapped)
    assert found["lm.model.layers.0.mlp.down_proj"] == "rowwise" and "head" not in found


def test_a_plan_that_a_user_sets() -> None:
    model = Stack()
    model._tp_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
    assert styles(model) == {f"blocks.{i}.{n}": s for i in (0, 1) for n, s in (("up", "colwise"), ("down", "rowwise"))}


def test_gpt2_has_a_table_and_packed_matrices() -> None:
    plan = plan_of(make("GPT2"), None, 2)
    packed = {split.name: split.packed for split in plan.splits}
    assert packed["transformer.h.0.attn.c_attn"] == 3 and packed["transformer.h.0.mlp.c_fc"] == 1


def test_a_policy_is_a_plan() -> None:
    found = styles(Stack(), policy={Block: "down"})
    assert found["blocks.0.up"] == "colwise" and found["blocks.0.down"] == "rowwise"
    assert styles(Stack(), policy={"Block": ["down"]}) == found


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({}, "injection_policy is empty: nothing is split"),
        ({nn.Conv2d: ("x",)}, "names Conv2d, of which the model has none. Give one of its classes: Block, Linear"),
        ({Block: ("o_proj",)}, "Block has no linear layer o_proj. It has up, down"),
        ({Block: 3}, r"injection_policy\[Block\] is 3. Give the names of its row-parallel linears"),
    ],
)
def test_a_policy_that_cannot_be_followed(policy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(Stack(), policy, 2)


@pytest.mark.parametrize(
    ("family", "ranks", "message"),
    [
        (
            "Llama",
            4,
            r"tp_size 4 does not divide the 2 heads of .*k_proj \(and 3 more\).*LlamaForCausalLM: 1, 2\.",
        ),
        ("GPT2", 3, r"tp_size 3 does not divide the 4 heads of transformer.h.0.attn.c_attn.*: 1, 2, 4\."),
    ],
)
def test_sizes_that_do_not_divide(family: str, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(make(family), None, ranks)


def test_no_plan() -> None:
    with pytest.raises(ConfigError, match="tp_size 2 with a Stack: modules from elsewhere are not split without"):
        plan_of(Stack(), None, 2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layers.*.x": "colwise"}, "the tensor-parallel plan of Stack matches none of its modules"),
        (
            {"blocks.*.up": "sideways"},
            r"plan wants blocks.\*.up 'sideways'; known are colwise, .*Use tp_size 1 with",
        ),
        ({"blocks.*.up": "moe_tp_experts"}, "Experts are not split over tensor-parallel ranks yet"),
        ({"blocks.*": "colwise"}, "blocks.0 is a .*Block, which is not split over tensor-parallel ranks"),
    ],
)
def test_a_plan_that_cannot_be_followed(plan: dict[str, str], message: str) -> None:
    model = Stack()
    model._tp_plan = plan
    with pytest.raises(ConfigError, match=message):
        plan_of(model, None, 2)


def test_a_style_that_nothing_has_is_no_problem() -> None:
    model = Stack()
    model._tp_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "blocks.*.experts": "moe_tp_experts"}
    assert len(styles(model)) == 4


def test_a_lora_layer_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("Llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"q_proj is a peft\.tuners\.lora\.layer\.Linear, which is not split"):
        plan_of(model, None, 2)


def test_a_shared_weight_is_refused() -> None:
    model = Stack()
    model.blocks[0].up.weight = model.blocks[1].up.weight
    with pytest.raises(ConfigError, match=r"blocks.0.up, blocks.1.up shares a parameter with another module"):
        _check_ties(plan_of(model, {Block: "down"}, 2).splits, _shared(model))


@pytest.mark.parametrize("cut", [Cut((6, 4), 0), Cut((6, 4), 1), Cut((4, 12), 1, 3), Cut((12,), 0, 3)])
def test_parts_tile_the_whole(cut: Cut) -> None:
    seen = torch.zeros(cut.shape)
    for part in range(2):
        for box in cut.boxes(part, 2):
            box.of(seen).add_(1)
    assert torch.equal(seen, torch.ones(cut.shape))
