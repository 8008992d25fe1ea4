"""What an engine is made of, for the files that its methods are spread over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megazero.base.log import Log
from megazero.config.schema import RunConfig
from megazero.engine.accumulation import Accumulation
from megazero.engine.checkpoint import Piece
from megazero.engine.feed import Feed
from megazero.engine.frozen import Frozen
from megazero.engine.introspection import Reporter
from megazero.engine.monitors import Monitors
from megazero.engine.optimizer import ShardOptimizer
from megazero.engine.optimizer_view import OptimizerView
from megazero.engine.precision import Precision
from megazero.engine.scaler import LossScaler
from megazero.engine.timers import Timers
from megazero.engine.update import Divisors, StepResult
from megazero.parallel.pipeline import Pipeline
from megazero.parallel.topology import Topology
from megazero.zero.access import Owner
from megazero.zero.zero import Zero


class Parts:
    """The attributes of an Engine, and those of its methods that other files call."""

    module: nn.Module
    topology: Topology
    settings: RunConfig
    """Resolved."""
    device: torch.device
    log: Log
    max_norm: float
    """Largest gradient norm; 0 does not clip."""
    policy: str
    """What to do about numbers that are not finite."""
    precision: Precision
    scaler: LossScaler | None
    zero: Zero
    shards: ShardOptimizer | None
    """The optimizer over ZeRO's shards; None when nothing is trained."""
    optimizer: OptimizerView | None
    """The same, as a torch optimizer for the user."""
    lr_scheduler: Any
    frozen: Frozen
    accumulation: Accumulation
    pipeline: Pipeline | None
    feed: Feed
    timers: Timers
    reporter: Reporter
    monitors: Monitors | None
    last: StepResult | None
    """What the last update did."""
    let_go_by: str | None
    """What made this engine let go of its module; None while it holds it."""
    source: Mapping[str, Any] | None
    """The ds_config that initialize() was given."""
    owner: Owner
    """Where megazero.zero.safe_get_… find this engine's parameters."""
    _loss_is_scaled: bool
    """The present backward starts from a loss that was multiplied by the loss scale as a whole."""

    if TYPE_CHECKING:

        @property
        def loss_scale(self) -> float: ...
        def train_batch_size(self) -> int: ...
        def get_lr(self) -> list[float]: ...
        def pieces(self, *, for_save: bool) -> dict[str, list[Piece]]: ...
        def let_go(self, by: str, *, exact: bool = False) -> None: ...
        def loaded(self) -> None: ...
        def use_pipeline(self, make: Callable[[Callable[[nn.Module], None]], Pipeline]) -> None: ...
        def _over_batch(self, tensor: Tensor) -> Tensor: ...
        def _update(
            self,
            loss: Tensor | None,
            divisors: Callable[[float], Divisors],
            *,
            items: Tensor | None = None,
            notice: Tensor | None = None,
        ) -> StepResult: ...
