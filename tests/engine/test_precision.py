"""Types in a forward, and what the engine says when they do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.config.deepspeed import read_deepspeed
from megazero.engine import initialize
from megazero.engine.precision import scaled_outputs
from megazero.parallel.topology import Topology
from tests.engine.fronts import WIDTH, assert_like, batch_of, config_of, engine_of, plain, train


def test_autocast_keeps_fp32_weights() -> None:
    engine = engine_of(config=config_of(torch_autocast={"enabled": True, "dtype": "bfloat16"}))
    seen: list[torch.dtype] = []
    engine.module.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(engine, 5)
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in engine.module.parameters()} == {torch.float32}
    assert engine.scaler is None
    assert_like(engine, plain(5)[0], 2e-2)
    assert engine_of(config=config_of(torch_autocast={"enabled": True, "dtype": "float16"})).scaler is not None


def test_inputs_are_cast_when_asked() -> None:
    engine = engine_of(config=config_of(1, "fp16", fp16={"enabled": True, "auto_cast": True, "initial_scale_power": 4}))
    x, target = batch_of(0)
    engine.backward(engine(x, target=target))
    engine.step()
    assert engine.was_step_applied()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_mismatch_comes_with_a_remedy(precision: str) -> None:
    engine = engine_of(config=config_of(1, precision))
    with pytest.raises(RuntimeError) as caught:
        engine(batch_of(0)[0])
    (note,) = caught.value.__notes__
    name = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert f"The weights are torch.{name}" in note and '"auto_cast": true' in note and '"torch_autocast"' in note
    with pytest.raises(RuntimeError) as other:
        engine(torch.ones(1, WIDTH + 1, dtype=engine.precision.dtype))
    assert not getattr(other.value, "__notes__", [])


@pytest.mark.parametrize(("bf16", "on_gpu"), [(False, "fp16"), ("auto", "bf16")])
def test_auto_respects_a_no_to_bf16(bf16: Any, on_gpu: str) -> None:
    source = read_deepspeed({"fp16": {"enabled": "auto"}, "bf16": {"enabled": bf16}})
    for kind, expected in (("cuda", on_gpu), ("cpu", "fp32")):
        found = initialize._settle(source, Topology.single(), nn.Linear(2, 2), torch.device(kind))
        assert found.config.training.precision == expected


@dataclass
class Output:
    loss: Tensor
    rest: list[Tensor]


class Bundle(nn.Module):
    """A loss that depends on another output, in several wrappings."""

    def forward(self, x: Tensor, kind: str) -> Any:
        logits = x * 2
        loss = logits.sum()
        count = torch.tensor(3)
        return {
            "tuple": (loss, logits, count, "text"),
            "dict": {"loss": loss, "logits": logits, "count": count},
            "dataclass": Output(loss, [logits]),
        }[kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_each_path_is_scaled_once(kind: str) -> None:
    factor = [8.0]
    x = torch.ones(3, requires_grad=True)
    out = scaled_outputs(Bundle()(x, kind), lambda: factor[0])
    if kind == "dataclass":
        assert isinstance(out, Output)
        loss, logits = out.loss, out.rest[0]
    else:
        loss, logits = (out[0], out[1]) if kind == "tuple" else (out["loss"], out["logits"])
    assert loss.item() == 6.0
    (loss + logits.sum()).backward()
    assert x.grad is not None and x.grad.tolist() == [32.0] * 3  # 2 · 8 through the loss, 2 · 8 through the logits


def test_a_model_output_stays_what_it_is() -> None:
    from transformers.modeling_outputs import CausalLMOutput

    out = CausalLMOutput(loss=torch.ones((), requires_grad=True) * 1, logits=torch.ones(2))
    found = scaled_outputs(out, lambda: 2.0)
    assert isinstance(found, CausalLMOutput) and found.loss is not out.loss and found["logits"] is not None
    assert found.to_tuple()[0].item() == 1.0
