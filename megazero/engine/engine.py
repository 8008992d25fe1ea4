"""The engine: a module, ZeRO, an optimizer and a precision, and one order of work for a step.

    native     train_step(micro-batches, loss_sum, tokens): count tokens → forward and backward of each → update
    DeepSpeed  engine(batch) → engine.backward(loss) → engine.step(), which updates at the boundary of accumulation
    pipeline   train_batch(): all micro-batches of a step through this rank's stages → update

All end in one `update` (update.py). It serves any nn.Module and never imports a model; what it lacks, its module has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.base.log import Log
from megazero.config.schema import LossScalingConfig, OptimizerConfig, RunConfig
from megazero.engine.accumulation import Accumulation
from megazero.engine.checkpoint import Piece
from megazero.engine.feed import Feed
from megazero.engine.front import Front
from megazero.engine.frozen import Frozen
from megazero.engine.introspection import Reporter, state_bytes
from megazero.engine.monitors import Monitors
from megazero.engine.optimizer import ShardOptimizer
from megazero.engine.optimizer_view import OptimizerView
from megazero.engine.precision import DTYPES, Precision
from megazero.engine.queries import Queries
from megazero.engine.scaler import LossScaler
from megazero.engine.timers import Timers
from megazero.engine.update import Divisors, StepResult, update
from megazero.parallel.collectives import all_reduce
from megazero.parallel.pipeline import Pipeline
from megazero.parallel.random import initial_values
from megazero.parallel.topology import Topology
from megazero.zero.access import register
from megazero.zero.buckets import Bucket
from megazero.zero.configure import zero_of
from megazero.zero.release import hand_back
from megazero.zero.state_dict import register_hooks

__all__ = ["DTYPES", "Engine", "LossSum", "StepResult", "pipeline_inputs"]

LossSum = Callable[[nn.Module, Any], Tensor]


class Engine(Front, Queries):
    """Trains `module` on `topology`.

    Args:
        module: built on meta with shard specs, or real.
        config: resolved; precision not `auto`.
        device: where parameters live.
        units: names of the submodules that ZeRO treats as one unit each (the blocks).
        optimizer: made over the module's parameters; by default what the configuration says; None: nothing is trained.
    """

    def __init__(
        self,
        module: nn.Module,
        topology: Topology,
        config: RunConfig,
        device: torch.device,
        units: list[str],
        *,
        optimizer: torch.optim.Optimizer | OptimizerConfig | Literal["config"] | None = "config",
    ) -> None:
        self.module, self.topology, self.settings, self.device = module, topology, config, device
        self.max_norm, self.policy = config.optimizer.clip_grad, config.training.non_finite
        self.log = Log(topology.rank)
        self.precision = Precision(config.training, device)
        self.scaler = _scaler(config.loss_scaling) if self.precision.scales_loss else None
        chosen = config.optimizer if optimizer == "config" else optimizer
        seed, trains = config.training.seed, _trains(chosen)
        self.zero = zero_of(
            config,
            module,
            topology,
            dtype=self.precision.dtype,
            device=device,
            initial=lambda place: initial_values(place.spec, seed),
            units=units,
            trained=trains,
        )
        self.shards = None if chosen is None else ShardOptimizer(self.zero, chosen)
        register_hooks(self.zero)
        self.owner = register(self.zero, self._states_of)
        self.owner.let_go = partial(self.let_go, exact=True)
        self.owner.factor = self._gradient_factor
        self.optimizer = None if self.shards is None else OptimizerView(self, self.shards)
        self.lr_scheduler: Any = None
        ranks = topology.size("dp")
        micro, batch = config.training.micro_batch_size, config.training.global_batch_size
        steps = max(batch // (micro * ranks), 1) if batch else config.training.gradient_accumulation_steps or 1
        self.frozen = Frozen(module)
        self.accumulation = Accumulation(steps, topology.size("zero"), device)
        self.pipeline: Pipeline | None = None
        self.feed = Feed(device)
        self.timers = Timers(config.logging.wall_clock_breakdown, device)
        self.timers.watch(self.zero, "wait_parameters", "gather")
        if self.zero.gatherer is not None:
            self.timers.watch(self.zero.gatherer, "need", "gather")
        self.reporter = Reporter(
            config.logging, topology, self.timers, lambda: state_bytes(module, self.zero, self.shards)
        )
        self.monitors: Monitors | None = None
        self.last: StepResult | None = None
        self.let_go_by: str | None = None
        self.source: Mapping[str, Any] | None = None
        self._loss_is_scaled = False

    def let_go(self, by: str, *, exact: bool = False) -> None:
        """Give the module back, as `destroy` says; this engine is of no more use. Collective.

        Args:
            by: what asked for it, for the error of who uses the engine still.
            exact: 16-bit parameters get the values and the type of their fp32 masters.

        Raises ConfigError inside a GatheredParameters block.
        """
        if self.let_go_by is not None:
            return
        hand_back(self.zero, exact=exact)
        if self.shards is not None:
            self.shards.release()
        self.zero.homes.close()
        self.let_go_by = by
        self.optimizer = self.lr_scheduler = self.pipeline = None
        del self.zero, self.shards, self.owner

    def use_pipeline(self, make: Callable[[Callable[[nn.Module], None]], Pipeline]) -> None:
        """Train through a pipeline of this module's stages from now on. `make` gets what the pipeline is to call when a
        stage's weight gradients were computed without hooks.

        Raises ConfigError under autocast, which would decide the type of what goes from stage to stage.
        """
        if self.precision.autocast is not None:
            raise ConfigError(
                "autocast with a pipeline of several stages: it changes the types of what goes from one to the next. "
                "Use bf16 weights (precision bf16), or one stage."
            )
        self.pipeline = pipeline = make(self._take_gradients)
        holders = Counter(p for stage in pipeline.stages for p in stage.module.parameters())
        self.zero.expect(lambda parameter: holders[parameter], pipeline.micro_batches)
        for stage in pipeline.stages:
            if self.zero.gatherer is not None and stage.module is not self.module:
                self.zero.gatherer.also_root(stage.module)

    def _take_gradients(self, stage: nn.Module) -> None:
        for parameter in stage.parameters():
            if parameter.grad is not None:
                self.zero.gradient_ready(parameter)

    # the native step

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
        assert self.shards is not None and self.optimizer is not None
        count = self._over_batch(torch.tensor(token_count, dtype=torch.float64, device=self.device))
        tokens = max(float(count), 1.0)
        scaled = (count.clamp(min=1.0) / self.loss_scale).float()  # what a loss is divided by
        if self.pipeline is None:
            total = self._accumulate(micro_batches, loss_sum, scaled)
        else:
            total = self.pipeline.train([pipeline_inputs(batch) for batch in micro_batches], scaled)
            self.zero.end_backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return self._update(total, lambda _: Divisors(1.0, tokens), notice=torch.tensor(notice))

    def _accumulate(self, micro_batches: Sequence[Any], loss_sum: LossSum, denominator: Tensor) -> Tensor:
        """Forward and backward one after the other; the sum of the losses, fp64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            self.zero.sync = index == len(micro_batches) - 1
            with self.precision.forward():
                loss = loss_sum(self.module, batch)
            (loss / denominator).backward()
            self.zero.end_backward()
            total += loss.detach()
        return total

    def _update(
        self,
        loss: Tensor | None,
        divisors: Callable[[float], Divisors],
        *,
        items: Tensor | None = None,
        notice: Tensor | None = None,
    ) -> StepResult:
        """From gradients to weights; see `update`."""
        assert self.shards is not None
        return update(
            self.zero,
            self.shards,
            self.scaler,
            self.timers,
            max_norm=self.max_norm,
            policy=self.policy,
            loss=loss,
            items=items,
            notice=notice,
            speaks=self._speaks_for_replica(),
            divisors=divisors,
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], loss_sum: LossSum, token_count: float) -> tuple[float, float]:
        """(sum of token losses, number of tokens) of the global batch, equal on all ranks."""
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.pipeline is None:
            for batch in micro_batches:
                with self.precision.forward():
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
        """What is sharded: fp32 masters under `weights`, per-element states under `optimizer`.

        To load, call `optimizer.prepare` first, so that the states exist.

        Raises CheckpointError to save what an update has left half-way, OffloadError for a file that cannot be read.
        """
        if for_save and self.shards is not None:
            self.shards.check_whole()
        weights = self.zero.pieces(self.zero.masters(), for_save=for_save)
        found = {"weights": [Piece(*p) for p in weights]}
        if self.shards is not None:
            states = [
                piece
                for key in self.shards.state_keys()
                for piece in self.zero.pieces(self.shards.buffers(key), for_save=for_save, suffix=f".{key}")
            ]
            found["optimizer"] = [Piece(*p) for p in states]
        return found

    def _states_of(self, bucket: Bucket, key: str) -> list[tuple[int, Tensor]]:
        """One of the optimizer's per-element states of a bucket: (first element, tensor)."""
        if self.shards is None or key not in self.shards.state_keys():
            return []
        return [(start, tensor) for of, start, tensor in self.shards.buffers(key) if of is bucket]

    def _gradient_factor(self) -> float:
        """What makes the step's mean of the summed gradients, before the update. Collective over the ZeRO group when
        losses came with a count."""
        divisor = self.accumulation.divisor
        if divisor is None:
            divisor = max(float(self._over_batch(self.accumulation.items.clone())), 1.0) / self.accumulation.unit
        return 1.0 / (self.loss_scale * divisor)

    def loaded(self) -> None:
        """Make masters that were filled from a checkpoint the parameters of every rank."""
        self.zero.publish()
        self.zero.wait_parameters()


def _trains(optimizer: torch.optim.Optimizer | OptimizerConfig | None) -> Callable[[nn.Parameter], bool]:
    """Which parameters are the optimizer's."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return lambda parameter: optimizer is not None
    listed = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return lambda parameter: parameter in listed


def _scaler(config: LossScalingConfig) -> LossScaler:
    return LossScaler(
        loss_scale=config.loss_scale,
        initial_loss_scale=2.0**16 if config.initial_loss_scale is None else config.initial_loss_scale,
        loss_scale_window=config.loss_scale_window,
        hysteresis=config.hysteresis,
        consecutive_hysteresis=config.consecutive_hysteresis,
        min_loss_scale=config.min_loss_scale,
    )


def pipeline_inputs(batch: Any) -> dict[str, Tensor]:
    """A micro-batch's tensors with one row a sample, by name: what goes to every stage of a pipeline."""
    named = batch if isinstance(batch, Mapping) else vars(batch)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}
