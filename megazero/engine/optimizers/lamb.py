"""LAMB: Adam's step, rescaled for each parameter by its norm (megazero/ops/lamb.py has the formula).

Over cuts of parameters the two norms are summed over the ranks: one small all-reduce for all parameters together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from megazero.engine.optimizers.closure import loss_of
from megazero.engine.sharded import (
    SINGLE,
    Shard,
    ShardMap,
    count_step,
    not_empty,
    shard_maps,
    spans_of,
    whole_shards,
)
from megazero.ops.lamb import lamb_direction, lamb_moments, trust_ratio
from megazero.parallel.collectives import all_reduce
from megazero.parallel.exchange import wire_device
from megazero.parallel.topology import AxisGroup


class Lamb(torch.optim.Optimizer):
    """LAMB as in the paper, its ratio kept between `min_coeff` and `max_coeff` (names and values of DeepSpeed's).

    The bias correction is the paper's, of both moments before the ratio is taken; DeepSpeed multiplies the learning
    rate with it afterwards, which makes its first steps smaller.
    """

    whole_tensors = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        if lr < 0:
            raise ValueError(f"Lamb with lr {lr}: a learning rate is 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lamb with betas {betas}: each must be at least 0 and below 1")
        if not 0 <= min_coeff <= max_coeff:
            raise ValueError(f"Lamb with min_coeff {min_coeff} and max_coeff {max_coeff}: 0 <= min_coeff <= max_coeff")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters with a gradient, which are whole."""
        loss = loss_of(closure)
        shards = list(whole_shards(self.param_groups, self.state))
        self._update(shards, ShardMap([spans_of(shards)]), SINGLE)
        return loss

    @torch.no_grad()
    def step_sharded(self, shards: Sequence[Shard], group: AxisGroup, part: Hashable = None) -> None:
        """One update of cut parameters: see StepsWhole. Raises ConfigError under tensor parallelism."""
        shards = not_empty(shards)
        places = shard_maps(self).of(shards, group, part, "Lamb")
        self._update(shards, places, group)

    def _update(self, shards: Sequence[Shard], places: ShardMap, group: AxisGroup) -> None:
        index = {name: at for at, name in enumerate(places.shapes)}
        if not index:
            return
        home = shards[0].tensor.device if shards else torch.device("cpu")
        squares = torch.zeros(2, len(index), dtype=torch.float64, device=wire_device(group, home))
        for shard in shards:
            if "exp_avg" not in shard.state:
                shard.state["exp_avg"] = torch.zeros_like(shard.tensor)
                shard.state["exp_avg_sq"] = torch.zeros_like(shard.tensor)
            count_step(shard.state)
            lamb_moments(shard.grad, shard.state["exp_avg"], shard.state["exp_avg_sq"], shard.group["betas"])
            norms = torch.stack([torch.linalg.vector_norm(t.float()) for t in (shard.tensor, _direction(shard))])
            squares[:, index[shard.name]] += norms.double().square().to(squares.device)
        weight_norms, direction_norms = all_reduce(squares, group).sqrt().tolist()
        for shard in shards:
            at, options = index[shard.name], shard.group
            ratio = trust_ratio(weight_norms[at], direction_norms[at], options["min_coeff"], options["max_coeff"])
            # Computed a second time, which costs less than keeping the directions of all parameters.
            shard.tensor.add_(_direction(shard), alpha=-float(options["lr"]) * ratio)


def _direction(shard: Shard) -> Tensor:
    return lamb_direction(
        shard.tensor,
        shard.state["exp_avg"],
        shard.state["exp_avg_sq"],
        int(shard.state["step"]),
        betas=shard.group["betas"],
        eps=shard.group["eps"],
        weight_decay=shard.group["weight_decay"],
        bias_correction=shard.group["bias_correction"],
        eps_inside_sqrt=shard.group["eps_inside_sqrt"],
    )
