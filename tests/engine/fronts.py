"""Models and plain training loops that `initialize()` is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megazero
from megazero.engine.engine import Engine

WIDTH, SAMPLES = 12, 16
LR = 1e-2


class Regressor(nn.Module):
    """Two blocks, a norm and a head; with targets, the mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        out = self.head(self.norm(x)).squeeze(-1)
        return out if target is None else F.mse_loss(out, target)


def make() -> Regressor:
    torch.manual_seed(7)
    return Regressor()


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """The global batch: [SAMPLES, WIDTH] and [SAMPLES]."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    return x, x.square().mean(1)


def parts_of(step: int, engine: Engine) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches."""
    group, steps = engine.topology.group("dp"), engine.gradient_accumulation_steps()
    mine = [tensor.chunk(group.size)[group.rank].chunk(steps) for tensor in batch_of(step)]
    return list(zip(*mine, strict=True))


def config_of(stage: int = 1, precision: str = "fp32", gas: int = 1, clip: float = 0.0, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": LR}},
    }
    if precision != "fp32":
        found[precision] = {"enabled": True}
    return found | more


def engine_of(model: nn.Module | None = None, config: dict[str, Any] | None = None, **arguments: Any) -> Engine:
    model = make() if model is None else model
    return megazero.initialize(model=model, config=config_of() if config is None else config, **arguments)[0]


def train(engine: Engine, steps: int, first: int = 0, backward: Callable[[Engine, Tensor], Any] | None = None) -> None:
    for step in range(first, first + steps):
        for x, target in parts_of(step, engine):
            loss = engine(x.to(engine.precision.dtype), target.to(engine.precision.dtype))
            (backward or (lambda e, loss: e.backward(loss)))(engine, loss)
            engine.step()


def plain(steps: int, clip: float = 0.0, **settings: Any) -> tuple[nn.Module, list[float], list[float]]:
    """torch's AdamW on the global batch: model, losses and gradient norms."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **settings)
    losses, norms = [], []
    for step in range(steps):
        loss = model(*batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        losses.append(loss.item())
        optimizer.step()
    return model, losses, norms


def masters_of(engine: Engine) -> dict[str, Tensor]:
    """The whole fp32 weights, on every rank."""
    from megazero.parallel.collectives import gather_objects

    return gather_objects(engine.consolidated_state_dict(fp32=True), engine.topology.group("world"))[0]


def assert_like(engine: Engine, model: nn.Module, tolerance: float = 2e-5) -> None:
    found, wanted = masters_of(engine), model.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight.float(), wanted[name].float(), rtol=0, atol=tolerance, msg=name)


def hf_model(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(3)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=40,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config)
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **settings))
