"""A small model with two mixtures of experts, its batches, and a plain training loop in one process, by which engines
with spread experts are held.

A step's loss is the mean over all ranks' micro-batches of (squared error + 0.1 · balancing losses): the latter is of a
part's own tokens, so the plain loop goes part by part too.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megazero
from megazero.engine.engine import Engine
from megazero.models.moe_layer import MoE
from megazero.parallel.collectives import gather_objects
from megazero.zero.access import safe_get_full_grad

WIDTH, INNER, EXPERTS, SAMPLES, LENGTH = 6, 10, 4, 16, 5
LR, EPS = 1e-2, 1e-4


class Expert(nn.Module):
    """With a buffer, which checkpoints hold too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))) * self.gain


class Block(nn.Module):
    def __init__(self, ep_size: int, **settings: Any) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        layer: dict[str, Any] = {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False, **settings}
        self.moe = MoE(WIDTH, Expert(), EXPERTS, ep_size, **layer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.tanh(self.mix(x))
        made, balance, _ = self.moe(self.norm(x))
        return x + made, balance


class Model(nn.Module):
    """(x [b, s, WIDTH], target [b, s]) -> loss."""

    def __init__(self, ep_size: int = 1, *, blocks: int = 2, **settings: Any) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(ep_size, **settings) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 1)

    def run(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = block(x)
        return made

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.first(x)
        balance = x.new_zeros(())
        for block in self.blocks:
            x, more = self.run(block, x)
            balance = balance + more
        return F.mse_loss(self.head(x).squeeze(-1).float(), target.float()) + 0.1 * balance


def fill(model: nn.Module, rank: int = 0, ranks: int = 1) -> nn.Module:
    """Values that depend on the name alone; `rank` of `ranks` holds its part of the experts, under local numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".deepspeed_experts." in name:
                head, _, tail = name.partition("deepspeed_experts.")
                number, _, rest = tail.partition(".")
                name = f"{head}deepspeed_experts.{int(number) + rank * EXPERTS // ranks}.{rest}"
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 1.0 if "gate" in name else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("norm.weight" in name))
    return model


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """The global batch."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator)
    return x, x.square().mean(2)


def parts_of(step: int, ranks: int, accumulation: int) -> list[list[tuple[Tensor, Tensor]]]:
    """By rank, the micro-batches."""
    x, target = batch_of(step)
    return [
        list(zip(own.chunk(accumulation), wanted.chunk(accumulation), strict=True))
        for own, wanted in zip(x.chunk(ranks), target.chunk(ranks), strict=True)
    ]


class Trained:
    """What a run did: losses and norms of each step, the first step's gradients, the last weights, by name."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}


def plain(ranks: int, accumulation: int = 1, clip: float = 0.0, steps: int = 3, **settings: Any) -> Trained:
    """torch in one process, with all experts, over what the ranks' micro-batches are."""
    model, found = fill(Model(1, **settings)), Trained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS)
    for step in range(steps):
        parts = [part for of_rank in parts_of(step, ranks, accumulation) for part in of_rank]
        loss = torch.stack([model(*part) for part in parts]).mean()
        optimizer.zero_grad()
        loss.backward()
        if not step:
            found.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        found.losses.append(float(loss.detach()))
        optimizer.step()
    found.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


def config_of(stage: int, accumulation: int = 1, clip: float = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 300},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "eps": EPS}},
        **more,
    }


def spread(ep_size: int, rank: int, built: bool = True, kind: type[Model] = Model, **settings: Any) -> nn.Module:
    """A model whose layers say `ep_size`, or hold all experts."""
    return fill(kind(ep_size, **settings), rank % ep_size, ep_size) if built else fill(kind(1, **settings))


def engine_of(model: nn.Module, config: dict[str, Any], **arguments: Any) -> Engine:
    return megazero.initialize(model=model, config=config, **arguments)[0]


def train(engine: Engine, steps: int = 3, first: int = 0) -> Trained:
    found, accumulation = Trained(), engine.gradient_accumulation_steps()
    dtype = engine.precision.dtype
    for step in range(first, first + steps):
        for x, target in parts_of(step, engine.dp_world_size, accumulation)[engine.topology.group("dp").rank]:
            engine.backward(engine(x.to(dtype), target.to(dtype)))
            if not found.gradients and engine.is_gradient_accumulation_boundary():
                found.gradients = whole_gradients(engine)
            engine.step()
        assert engine.last is not None
        found.losses.append(engine.last.loss)
        found.norms.append(engine.last.grad_norm)
    found.weights = weights_of(engine)
    return found


def whole_gradients(engine: Engine) -> dict[str, Tensor]:
    """Of all parameters by name, on every rank; ranks that hold a parameter must agree about its gradient."""
    asked = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
    mine = {name: gradient for name, gradient in asked.items() if gradient is not None}
    found: dict[str, Tensor] = {}
    for of_rank in gather_objects(mine, engine.topology.group("world")):
        for name, gradient in of_rank.items():
            assert torch.equal(found.setdefault(name, gradient), gradient), name
    return found


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """fp32 masters by name, on every rank, without buffers."""
    state = gather_objects(engine.consolidated_state_dict(fp32=True), engine.topology.group("world"))[0]
    return {name: value for name, value in state.items() if not name.endswith("gain")}


def assert_alike(found: Trained, wanted: Trained, tolerance: float = 2e-5) -> None:
    """Loss 1e-6, norm 1e-5, gradients 1e-4 of their own norm, weights `tolerance` absolute."""
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.norms, wanted.norms, rtol=1e-5, atol=0)
    assert found.gradients.keys() == wanted.gradients.keys() and found.weights.keys() == wanted.weights.keys()
    least = 1e-6 * wanted.norms[0]
    for name, gradient in found.gradients.items():
        error = float((gradient - wanted.gradients[name]).norm())
        assert error <= 1e-4 * max(float(wanted.gradients[name].norm()), least), f"gradient of {name}: {error}"
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, wanted.weights[name], rtol=0, atol=tolerance, msg=name)
