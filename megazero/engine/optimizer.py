"""The torch optimizer over ZeRO's shards.

Each owned part of a bucket is cut where the weight-decay group changes; each cut is one flat Parameter, a view of the
fp32 master, whose `.grad` is a view of the reduced gradients. Any element-wise torch optimizer can step on these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megazero.config.schema import OptimizerConfig
from megazero.ops.adam import fused_adamw
from megazero.zero.buckets import Bucket, Placed
from megazero.zero.zero import Zero

Piece = tuple[Bucket, int, Tensor]


class ShardOptimizer:
    """Steps the owned masters. `optimizer` is a torch.optim.Optimizer over the cuts."""

    def __init__(self, zero: Zero, config: OptimizerConfig) -> None:
        self._cuts: list[tuple[Bucket, int, nn.Parameter]] = []
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for bucket, decays, start, stop in zero.segments(decays_weight):
            base = bucket.owned[0]
            cut = nn.Parameter(bucket.master[start - base : stop - base])
            cut.grad = bucket.grads[start:stop]
            self._cuts.append((bucket, start, cut))
            groups[bool(decays)].append(cut)
        listed = [
            {"params": cuts, "weight_decay": config.weight_decay if decays else 0.0}
            for decays, cuts in groups.items()
            if cuts
        ]
        self.optimizer = _make(listed, config) if listed else None  # a rank may own padding only

    def step(self, lr: float) -> None:
        """One update with this learning rate."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def state_keys(self) -> list[str]:
        """Names of the per-element states that exist, e.g. exp_avg and exp_avg_sq; empty before the first step."""
        return sorted(key for key, value in self._first_state().items() if _per_element(value))

    def scalars(self) -> dict[str, float]:
        """States that are one number, equal for all parameters, e.g. the step count."""
        return {k: float(v) for k, v in self._first_state().items() if not _per_element(v) and v is not None}

    def buffers(self, key: str) -> list[Piece]:
        """One per-element state of all cuts, as `Zero.pieces` takes them."""
        if self.optimizer is None:
            return []
        return [(bucket, start, self.optimizer.state[cut][key]) for bucket, start, cut in self._cuts]

    def prepare(self, keys: list[str], scalars: dict[str, float]) -> None:
        """Make zeroed states of these names, to load a checkpoint into."""
        if self.optimizer is None:
            return
        for _, _, cut in self._cuts:
            self.optimizer.state[cut] = {key: torch.zeros_like(cut) for key in keys} | {
                key: torch.tensor(value, dtype=torch.float32, device=cut.device) for key, value in scalars.items()
            }

    def _first_state(self) -> dict[str, Any]:
        if self.optimizer is None or not self._cuts:
            return {}
        return dict(self.optimizer.state.get(self._cuts[0][2], {}))


def decays_weight(place: Placed) -> bool:
    """Whether weight decay applies: not to biases and other 1-D parameters (Megatron's rule)."""
    return len(place.spec.shape) > 1


def _per_element(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _make(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=True)
    return fused_adamw(groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps)
