"""The engine: a module, ZeRO, an optimizer and a precision, and one order of work for a step.

    count tokens over all ranks → forward and backward of each micro-batch (loss sum / global count) → finish the
    reduction → one pass for norm, loss and finiteness (one all-reduce over the world) → clip → step → gather parameters

It serves any nn.Module and never imports a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megazero.base.errors import NonFiniteError
from megazero.config.schema import RunConfig
from megazero.engine.checkpoint import Piece
from megazero.engine.nonfinite import describe
from megazero.engine.optimizer import ShardOptimizer
from megazero.parallel.collectives import all_reduce
from megazero.parallel.random import initial_values
from megazero.parallel.topology import Topology
from megazero.zero.zero import Zero

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: float
    """Mean loss of the global batch's unmasked tokens."""
    grad_norm: float
    """Global gradient norm before clipping."""
    skipped: bool
    """The weights were left alone because of a non-finite number."""
    notice: float
    """Sum over the ranks of what they passed as `notice`."""
    warning: str | None
    """What to tell the user about this step."""


class Engine:
    """Trains `module` on `topology`.

    Args:
        module: built on meta with shard specs, or real.
        config: resolved; precision not `auto`.
        device: where parameters live.
        units: names of the submodules that ZeRO treats as one unit each (the blocks).
    """

    def __init__(
        self, module: nn.Module, topology: Topology, config: RunConfig, device: torch.device, units: list[str]
    ) -> None:
        self.module, self.topology, self.device = module, topology, device
        self.max_norm, self.policy = config.optimizer.clip_grad, config.training.non_finite
        seed, parallel = config.training.seed, config.parallel
        self.zero = Zero(
            module,
            topology,
            stage=parallel.zero_stage,
            dtype=DTYPES[config.training.precision],
            device=device,
            initial=lambda place: initial_values(place.spec, seed),
            units=units,
            bucket_elements=parallel.ddp_bucket_size,
            overlap_reduce=parallel.overlap_grad_reduce,
            overlap_gather=parallel.overlap_param_gather,
            wire_dtype=torch.bfloat16 if parallel.grad_reduce_in_bf16 else None,
        )
        self.optimizer = ShardOptimizer(self.zero, config.optimizer)

    def train_step(
        self,
        micro_batches: Sequence[Any],
        loss_sum: Callable[[nn.Module, Any], Tensor],
        token_count: float,
        *,
        lr: float,
        notice: float = 0.0,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            loss_sum: gives the sum of a micro-batch's token losses, a scalar with a graph.
            token_count: unmasked tokens in all of this rank's micro-batches.
            notice: a number to be summed over the ranks on the way (a request to stop, say).

        Raises NonFiniteError under the policy `raise`.
        """
        count = self._over_batch(torch.tensor(token_count, dtype=torch.float64, device=self.device))
        denominator = count.clamp(min=1.0).float()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            self.zero.sync = index == len(micro_batches) - 1
            loss = loss_sum(self.module, batch)
            (loss / denominator).backward()
            total += loss.detach()
        self.zero.finish_reduction()
        local_loss = total / denominator
        mine = self._speaks_for_replica()
        sums = torch.stack([self.zero.norm_squared(), total * mine, torch.full_like(total, notice)])
        norm_squared, loss_total, noticed = all_reduce(sums, self.topology.group("world")).tolist()
        loss_mean = loss_total / max(float(count), 1.0)
        norm = math.sqrt(norm_squared) if norm_squared >= 0 else norm_squared
        warning, skipped = None, False
        if not (math.isfinite(norm) and math.isfinite(loss_mean)) and self.policy != "ignore":
            warning = describe(self.zero, loss_mean, float(local_loss))
            if self.policy == "raise":
                raise NonFiniteError(
                    f"{warning}. Lower the learning rate or look at the data; --non-finite skip goes on."
                )
            skipped = True
        else:
            if self.max_norm > 0 and norm > self.max_norm:
                self.zero.scale_gradients(self.max_norm / (norm + 1e-6))
            self.optimizer.step(lr)
            self.zero.publish()
        return StepResult(loss_mean, norm, skipped, noticed, warning)

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Sequence[Any], loss_sum: Callable[[nn.Module, Any], Tensor], token_count: float
    ) -> tuple[float, float]:
        """(sum of token losses, number of tokens) of the global batch, equal on all ranks."""
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            total += loss_sum(self.module, batch)
        self.module.train()
        both = self._over_batch(torch.stack([total, torch.full_like(total, token_count)]))
        return float(both[0]), float(both[1])

    def _over_batch(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that see different data."""
        return all_reduce(tensor, self.topology.group("zero"))

    def _speaks_for_replica(self) -> bool:
        """One rank of each model replica counts its loss; the others hold the same one."""
        return self.topology.group("model").rank == 0

    # checkpoint

    def pieces(self, *, for_save: bool) -> dict[str, list[Piece]]:
        """Everything a checkpoint holds: fp32 masters under `weights`, per-element states under `optimizer`.

        To load, call `optimizer.prepare` first, so that the states exist.
        """
        weights = self.zero.pieces(self.zero.masters(), for_save=for_save)
        states = [
            piece
            for key in self.optimizer.state_keys()
            for piece in self.zero.pieces(self.optimizer.buffers(key), for_save=for_save, suffix=f".{key}")
        ]
        return {"weights": [Piece(*p) for p in weights], "optimizer": [Piece(*p) for p in states]}

    def loaded(self) -> None:
        """Make masters that were filled from a checkpoint the parameters of every rank."""
        self.zero.publish()
        self.zero.wait_parameters()
