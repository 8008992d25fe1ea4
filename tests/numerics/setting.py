"""The small model that every test of this folder trains, its batches, and the runs over them.

A run is one point of stage × precision × accumulation × clip × offload × ranks. All runs see the same global batch in a
step, in the same order of samples: rank r's micro-batch m is part (r, m) of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, WIDTH, INNER, BLOCKS = 41, 12, 20, 3  # no multiples of anything: flat slices cut parameters
SAMPLES, LENGTH, STEPS = 16, 8, 10
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
"""eps: by 1e-8 an element whose gradient is rounding noise would take whole steps."""
CLIP = 1.8
"""Below the gradient norms of most steps, and above those of some."""
SCALE = 2.0**10
"""Of the loss, where it is constant."""
DYNAMIC = {"initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 1, "min_loss_scale": 1}
"""The first steps overflow, later ones grow the scale again."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Small(nn.Module):
    """Embedding, blocks, norm, head. Gives the mean loss over the batch, in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:  # (b, s) each
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), target.flatten())


def build() -> Small:
    torch.manual_seed(11)
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():  # gradients that matter everywhere
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.head.weight.mul_(3)
    return model


@dataclass(frozen=True)
class Run:
    """One point of the product."""

    stage: int = 0
    precision: str = "fp32"
    accumulation: int = 1
    clip: bool = False
    offload: str = "none"
    ranks: int = 2

    def __str__(self) -> str:
        clip = " clip" if self.clip else ""
        offload = "" if self.offload == "none" else f" {self.offload}"
        return f"stage {self.stage} {self.precision} {self.ranks} ranks g={self.accumulation}{clip}{offload}"

    @property
    def recipe(self) -> Recipe:
        """What the numbers may depend on."""
        return Recipe(self.precision, self.accumulation, self.clip, self.ranks)

    @property
    def dynamic(self) -> bool:
        """Whether fp16 scales its loss dynamically: half of the runs do."""
        return self.recipe.dynamic

    def config(self, folder: str) -> dict[str, Any]:
        """The ds_config. `folder` is for NVMe."""
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": 500}
        device: dict[str, Any] = {"device": self.offload}
        if self.offload == "nvme":
            device["nvme_path"] = folder
        if self.offload != "none":
            zero["offload_optimizer"] = device
            if self.stage == 3:
                zero["offload_param"] = device | ({"max_in_cpu": 0} if self.offload == "nvme" else {})
        found: dict[str, Any] = {
            "train_batch_size": SAMPLES,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": CLIP if self.clip else 0.0,
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": {**ADAM, "betas": list(ADAM["betas"])}},  # type: ignore[call-overload]
        }
        if self.precision == "bf16":
            found["bf16"] = {"enabled": True}
        elif self.precision == "fp16":
            found["fp16"] = {"enabled": True, **(DYNAMIC if self.dynamic else {"loss_scale": SCALE})}
        return found


@dataclass(frozen=True)
class Recipe:
    """What is left of a run when stage and offload do not matter."""

    precision: str
    accumulation: int
    clip: bool
    ranks: int

    @property
    def dynamic(self) -> bool:
        return self.precision == "fp16" and self.clip


@dataclass
class Outcome:
    """What a run brings back. Losses and norms of skipped steps are those that were measured (NaN where infinite)."""

    losses: list[float]
    norms: list[float]
    skipped: list[bool]
    weights: dict[str, Tensor]
    """The fp32 masters after the last step."""
    copies_differ: str = ""
    """The first parameter that is not the master's cast on some rank; "" if all are."""


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """The global batch: ids and targets, [SAMPLES, LENGTH] each."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, WORDS, (2, SAMPLES, LENGTH), generator=generator)
    return ids[0], (3 * ids[0] + ids[1] % 3) % WORDS


def part_of(step: int, rank: int, ranks: int, micro: int, accumulation: int) -> tuple[Tensor, Tensor]:
    """One micro-batch."""
    ids, target = (t.chunk(ranks)[rank].chunk(accumulation)[micro] for t in batch_of(step))
    return ids, target
