"""An ordinary torch module with token losses, its data, and plain training loops to hold the engine against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megazero.config.schema import OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megazero.engine.engine import Engine
from megazero.parallel.collectives import gather_objects
from megazero.parallel.topology import Topology

VOCAB, WIDTH, SAMPLES, LENGTH = 20, 16, 16, 6
LR = 1e-2


class Toy(nn.Module):
    """Next-token prediction: embedding, two residual layers, norm, untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x))


def make_toy() -> Toy:
    torch.manual_seed(11)
    return Toy()


def engine_of(module: nn.Module | None = None, **settings: Any) -> Engine:
    """Settings by field name, whichever section they are in."""
    values: dict[str, Any] = {"precision": "fp32", "lr": LR, "clip_grad": 0.0, "ddp_bucket_size": 200, **settings}
    sections = {}
    for name, kind in [("optimizer", OptimizerConfig), ("training", TrainingConfig), ("parallel", ParallelConfig)]:
        sections[name] = kind(**{k: values.pop(k) for k in list(values) if k in kind.__dataclass_fields__})
    assert not values, values
    config, module = RunConfig(**sections), module if module is not None else make_toy()
    return Engine(module, Topology.build(), config, torch.device("cpu"), ["layers.0", "layers.1"])


Batch = tuple[Tensor, Tensor, Tensor]


def global_batch(step: int) -> Batch:
    """Tokens, labels, mask [SAMPLES, LENGTH]; the masks are uneven and some rows are masked altogether."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=generator)
    mask = (torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0, 1, SAMPLES).unsqueeze(1)).float()
    return text[:, :-1], text[:, 1:], mask


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    tokens, labels, mask = batch
    losses = F.cross_entropy(model(tokens).float().flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum()


def micro_batches(step: int, rank: int, ranks: int, accumulation: int) -> tuple[list[Batch], float]:
    """This rank's part of the global batch in equal micro-batches, and its number of unmasked tokens."""
    parts = [x.chunk(ranks)[rank].chunk(accumulation) for x in global_batch(step)]
    return list(zip(*parts, strict=True)), float(sum(mask.sum() for mask in parts[2]))


def run_step(engine: Engine, step: int, accumulation: int = 4, **arguments: Any) -> Any:
    group = engine.topology.group("zero")
    batches, count = micro_batches(step, group.rank, group.size, accumulation)
    return engine.train_step(batches, loss_sum, count, **({"lr": LR} | arguments))


def masters(engine: Engine) -> dict[str, Tensor]:
    """The fp32 masters as logical tensors, on every rank."""
    mine = [(p.name, p.shape, p.box, p.tensor.clone()) for p in engine.pieces(for_save=True)["weights"]]
    wholes: dict[str, Tensor] = {}
    for pieces in gather_objects(mine, engine.topology.group("world")):
        for name, shape, box, tensor in pieces:
            box.of(wholes.setdefault(name, torch.full(shape, torch.nan))).copy_(tensor)
    return wholes


def decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def assert_weights(engine: Engine, model: nn.Module, tolerance: float = 1e-6) -> None:
    found = masters(engine)
    wanted = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name].detach().float(), rtol=0, atol=tolerance, msg=name)
