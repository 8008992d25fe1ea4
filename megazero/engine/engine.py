"""The engine: a module, ZeRO, an optimizer and a precision, and one order of work for a step.

    count tokens over all ranks → forward and backward of each micro-batch (loss sum / global count) → finish the
    reduction → one pass for norm, loss and finiteness (one all-reduce over the world) → clip → step → gather parameters

It serves any nn.Module and never imports a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from megazero.parallel.pipeline import Pipeline
from megazero.parallel.random import initial_values
from megazero.parallel.topology import Topology
from megazero.zero.zero import Zero

LossSum = Callable[[nn.Module, Any], Tensor]
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
        self.pipeline: Pipeline | None = None

    def use_pipeline(self, make: Callable[[Callable[[nn.Module], None]], Pipeline]) -> None:
        """Train through a pipeline of this module's stages from now on. `make` gets what the pipeline is to call when a
        stage's weight gradients were computed without hooks."""
        self.pipeline = pipeline = make(self._take_gradients)
        holders = Counter(p for stage in pipeline.stages for p in stage.module.parameters())
        self.zero.expect(lambda parameter: pipeline.micro_batches * holders[parameter])

    def _take_gradients(self, stage: nn.Module) -> None:
        for parameter in stage.parameters():
            if parameter.grad is not None:
                self.zero.gradient_ready(parameter)

    def train_step(
        self,
        micro_batches: Sequence[Any],
        loss_sum: LossSum,
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
        if self.pipeline is None:
            total = self._accumulate(micro_batches, loss_sum, denominator)
        else:
            total = self.pipeline.train([pipeline_inputs(batch) for batch in micro_batches], denominator)
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

    def _accumulate(self, micro_batches: Sequence[Any], loss_sum: LossSum, denominator: Tensor) -> Tensor:
        """Forward and backward one after the other; the sum of the losses, fp64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            self.zero.sync = index == len(micro_batches) - 1
            loss = loss_sum(self.module, batch)
            (loss / denominator).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], loss_sum: LossSum, token_count: float) -> tuple[float, float]:
        """(sum of token losses, number of tokens) of the global batch, equal on all ranks."""
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.pipeline is None:
            for batch in micro_batches:
                total += loss_sum(self.module, batch)
        else:
            for loss in self.pipeline.forward([pipeline_inputs(batch) for batch in micro_batches]):
                total += loss
        self.module.train()
        both = self._over_batch(torch.stack([total, torch.full_like(total, token_count)]))
        if self.pipeline is not None:
            both = self.pipeline.from_last(both)
        return float(both[0]), float(both[1])

    def _over_batch(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that see different data."""
        return all_reduce(tensor, self.topology.group("zero"))

    def _speaks_for_replica(self) -> bool:
        """One rank of each model replica counts its loss; the others hold the same one."""
        has_loss = self.pipeline is None or self.pipeline.has_last
        return has_loss and self.topology.group("tp").rank == 0

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


def pipeline_inputs(batch: Any) -> dict[str, Tensor]:
    """A micro-batch's tensors with one row a sample, by name: what goes to every stage of a pipeline."""
    named = batch if isinstance(batch, Mapping) else vars(batch)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}
