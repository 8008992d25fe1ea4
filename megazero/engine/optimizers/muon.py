"""Muon: hidden matrices by orthogonalised momentum, everything else by AdamW, in one optimizer.

Over cuts of parameters each matrix has one owner among the ranks that hold a part of it. Directions of cut matrices go
to their owners, which orthogonalise, and the updates come back: both in bf16, in which the iteration runs anyway.

    rank 0  [ w1 | w2 ..    ──directions──►  owner(w2) = the less busy one   ──updates──►   each rank its own elements
    rank 1       .. w2 | w3 ]                w1, w3: not cut, nothing travels
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megazero.engine.optimizers.closure import loss_of
from megazero.engine.optimizers.fused import can_fuse, listed
from megazero.engine.sharded import (
    SINGLE,
    Shard,
    ShardMap,
    Span,
    count_step,
    not_empty,
    shard_maps,
    spans_of,
    whole_shards,
)
from megazero.ops.muon import (
    ADJUSTMENTS,
    COEFFICIENTS,
    learning_rate_scale,
    matrices_of,
    muon_direction,
    orthogonalize,
)
from megazero.parallel.exchange import exchange_parts, wire_device
from megazero.parallel.topology import AxisGroup

# Tables that rows are looked up in, and the layers that give the model's output.
_NOT_HIDDEN = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|lm_head|heads?|output_layer|classifier|score)([._]|$)"
)
_LAST = re.compile(r"^(model\.)?output\.weight$")


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for hidden matrices, torch.optim.AdamW for embeddings, heads and all that is not a matrix.

    Which is which: a group's option `use_muon`; else the parameter's attribute `use_muon`; else its name, if parameters
    come with names (`Muon(model.named_parameters())`); without names, every matrix is taken by Muon. Every group that
    the user gives without `use_muon` becomes up to two, one for each.

    Args:
        lr, weight_decay: of both; `muon_lr` and `adam_lr` set one of the two learning rates apart.
        momentum, nesterov, ns_coefficients, ns_steps, ns_eps, adjust_lr_fn: torch.optim.Muon's (`ns_eps` is its eps).
        betas, eps: AdamW's.
    """

    whole_tensors = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        ns_eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        for name, value in {"lr": lr, "muon_lr": muon_lr, "adam_lr": adam_lr, "weight_decay": weight_decay}.items():
            if value is not None and value < 0:
                raise ValueError(f"Muon with {name} {value}: it is 0 or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"Muon with momentum {momentum}: it is at least 0 and below 1")
        if adjust_lr_fn not in (None, *ADJUSTMENTS):
            raise ValueError(f"Muon with adjust_lr_fn {adjust_lr_fn!r}: give one of {', '.join(ADJUSTMENTS)}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "use_muon": True,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "ns_eps": ns_eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": tuple(betas),
            "eps": eps,
        }
        rates = {True: lr if muon_lr is None else muon_lr, False: lr if adam_lr is None else adam_lr}
        super().__init__(_split_groups(listed(params), rates), defaults)
        for at, group in enumerate(self.param_groups):
            flat = [tuple(p.shape) for p in group["params"] if p.dim() < 2]
            if group["use_muon"] and flat:
                raise ValueError(
                    f"parameter group {at} has use_muon, and a parameter of shape {flat[0]}: Muon orthogonalises "
                    "matrices. Put it into a group with use_muon False, or leave use_muon out."
                )

    def state_names(self, group: dict[str, Any]) -> set[str]:
        """Names of the per-element states that parameters of a group have."""
        return {"momentum_buffer"} if group["use_muon"] else {"exp_avg", "exp_avg_sq"}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters with a gradient, which are whole."""
        loss = loss_of(closure)
        shards = list(whole_shards(self.param_groups, self.state))
        matrices = [shard for shard in shards if shard.group["use_muon"]]
        _muon(matrices, ShardMap([spans_of(matrices)]), SINGLE)
        _adamw([shard for shard in shards if not shard.group["use_muon"]])
        return loss

    @torch.no_grad()
    def step_sharded(self, shards: Sequence[Shard], group: AxisGroup, part: Hashable = None) -> None:
        """One update of cut parameters: see StepsWhole. Raises ConfigError under tensor parallelism."""
        shards = not_empty(shards)
        matrices = [shard for shard in shards if shard.group["use_muon"]]
        places = shard_maps(self).of(matrices, group, part, "Muon")
        _muon(matrices, places, group)
        _adamw([shard for shard in shards if not shard.group["use_muon"]])


def _split_groups(groups: list[dict[str, Any]], rates: dict[bool, float]) -> list[dict[str, Any]]:
    """Every group without `use_muon` as one for Muon and one for AdamW, each with its learning rate."""
    split: list[dict[str, Any]] = []
    for group in groups:
        if "use_muon" in group:
            group.setdefault("lr", rates[bool(group["use_muon"])])
            split.append(group)
            continue
        entries = [entry if isinstance(entry, tuple) else ("", entry) for entry in group["params"]]
        if _unclear(entries):
            warnings.warn(
                "Muon got parameters without names, so it takes every matrix among them, embeddings and output layers "
                "too, which AdamW should have. Give it model.named_parameters(), or groups with use_muon.",
                stacklevel=4,
            )
        for use in (True, False):
            chosen = [given for given, entry in zip(group["params"], entries, strict=True) if takes_muon(*entry) == use]
            if chosen:
                split.append({"lr": rates[use], **group, "params": chosen, "use_muon": use})
    return split


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a hidden matrix, as far as its shape, its own `use_muon` and its name (or "") tell."""
    said = getattr(parameter, "use_muon", None)
    if said is not None:
        return bool(said)
    return parameter.dim() == 2 and not _NOT_HIDDEN.search(name) and not _LAST.search(name)


def _unclear(entries: list[tuple[str, Tensor]]) -> bool:
    """Whether these look like a whole model's parameters, of which nothing says which are embeddings."""
    silent = [p for name, p in entries if not name and getattr(p, "use_muon", None) is None]
    return any(p.dim() == 2 for p in silent) and any(p.dim() != 2 for p in silent)


@dataclass(frozen=True)
class _Route:
    """A range of a cut matrix: who holds it, and who orthogonalises the matrix."""

    span: Span
    holder: int
    owner: int


def assign_owners(places: ShardMap) -> dict[str, int]:
    """The rank that orthogonalises each matrix: one that holds a part of it, so that the work is about even.

    Every rank computes the same answer.
    """
    work = [0] * len(places.spans)
    owners: dict[str, int] = {}
    costs = {}
    for name, shape in places.shapes.items():
        count, rows, columns = matrices_of(shape)
        costs[name] = count * min(rows, columns) ** 2 * max(rows, columns)
    # Uncut matrices first, since they have no choice; then the dear ones, so that the cheap ones level the load.
    for name in sorted(places.shapes, key=lambda name: (len(places.places[name]) > 1, -costs[name], name)):
        owner = min((rank for rank, _ in places.places[name]), key=lambda rank: (work[rank], rank))
        owners[name] = owner
        work[owner] += costs[name]
    return owners


def _muon(shards: Sequence[Shard], places: ShardMap, group: AxisGroup) -> None:
    """Momentum and direction by element; whole matrices orthogonalised by their owners; update by element."""
    owners = assign_owners(places)
    cut = {name for name, held in places.places.items() if len(held) > 1}
    routes = [_Route(span, rank, owners[name]) for name in sorted(cut) for rank, span in places.places[name]]
    wire = wire_device(group, shards[0].tensor.device if shards else torch.device("cpu"))
    here = dict(zip(spans_of(shards), shards, strict=True))
    sent = {span: _direction(shard).bfloat16().to(wire) for span, shard in here.items() if span.name in cut}
    arrived = _travel(sent, [(route.span, route.holder, route.owner) for route in routes], group, wire)
    done: dict[Span, Tensor] = {}
    for name, shard in {shard.name: shard for shard in shards}.items():
        if owners[name] != group.rank:
            continue
        parts = [span for _, span in places.places[name]]
        whole = torch.cat([arrived.pop(span) for span in parts]) if name in cut else _direction(shard)
        update = _orthogonalized(whole.to(wire), shard)
        if name in cut:
            done |= {span: update[span.start : span.stop] for span in parts}
        else:
            _apply(shard, update)
    returned = _travel(done, [(route.span, route.owner, route.holder) for route in routes], group, wire)
    for span, update in returned.items():
        _apply(here[span], update)


def _travel(
    pieces: dict[Span, Tensor], routes: list[tuple[Span, int, int]], group: AxisGroup, wire: torch.device
) -> dict[Span, Tensor]:
    """Bring the piece of each (span, from, to) there; what arrives at this rank. bf16 on the wire."""
    if not routes:
        return {}
    leaving: list[list[Tensor]] = [[torch.empty(0, dtype=torch.bfloat16, device=wire)] for _ in range(group.size)]
    coming: list[list[Span]] = [[] for _ in range(group.size)]
    for span, source, target in routes:
        if source == group.rank:
            leaving[target].append(pieces[span])
        if target == group.rank:
            coming[source].append(span)
    lengths = [[span.numel for span in spans] for spans in coming]
    arrived = exchange_parts([torch.cat(parts) for parts in leaving], [sum(each) for each in lengths], group)
    return {
        span: piece
        for spans, each, part in zip(coming, lengths, arrived, strict=True)
        for span, piece in zip(spans, part.split(each), strict=True)
    }


def _direction(shard: Shard) -> Tensor:
    """Flat, by element."""
    _drop(shard.state, "exp_avg", "exp_avg_sq")
    count_step(shard.state)  # not needed, but then the step is a state that all parameters have
    if "momentum_buffer" not in shard.state:
        shard.state["momentum_buffer"] = torch.zeros_like(shard.tensor)
    options = shard.group
    return muon_direction(shard.grad, shard.state["momentum_buffer"], options["momentum"], options["nesterov"])


def _drop(state: dict[str, Any], *names: str) -> None:
    """Forget states of the other half, which loading a checkpoint may have made for all parameters alike."""
    for name in names:
        state.pop(name, None)


def _orthogonalized(direction: Tensor, shard: Shard) -> Tensor:
    """The flat direction of a whole parameter -> its flat update, bf16."""
    options, (_, rows, columns) = shard.group, matrices_of(shard.shape)
    stack = direction.view(-1, rows, columns)
    done = [orthogonalize(m, options["ns_steps"], options["ns_coefficients"], options["ns_eps"]) for m in stack]
    return torch.stack(done).view(-1)


def _apply(shard: Shard, update: Tensor) -> None:
    options, (_, rows, columns) = shard.group, matrices_of(shard.shape)
    lr = float(options["lr"])
    shard.tensor.mul_(1 - lr * options["weight_decay"])
    scale = learning_rate_scale(rows, columns, options["adjust_lr_fn"])
    shard.tensor.add_(update.to(shard.tensor.device), alpha=-lr * scale)


def _adamw(shards: Sequence[Shard]) -> None:
    """torch's AdamW on the shards of each group together."""
    groups: dict[int, list[Shard]] = {}
    for shard in shards:
        groups.setdefault(id(shard.group), []).append(shard)
    for members in groups.values():
        options, tensors = members[0].group, [shard.tensor for shard in members]
        fused = can_fuse(tensors)
        for shard in members:
            _drop(shard.state, "momentum_buffer")
            if "exp_avg" not in shard.state:
                shard.state["exp_avg"] = torch.zeros_like(shard.tensor)
                shard.state["exp_avg_sq"] = torch.zeros_like(shard.tensor)
                shard.state["step"] = torch.zeros((), device=shard.tensor.device if fused else None)
        adamw(
            tensors,
            [shard.grad for shard in members],
            [shard.state["exp_avg"] for shard in members],
            [shard.state["exp_avg_sq"] for shard in members],
            [],
            [shard.state["step"] for shard in members],
            foreach=False,
            fused=fused,
            amsgrad=False,
            beta1=options["betas"][0],
            beta2=options["betas"][1],
            lr=options["lr"],
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            maximize=False,
        )
