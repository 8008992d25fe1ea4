"""Experts spread over ranks: which rank holds which, and the way of rows to their experts and back.

    rows [E, C, h] on each of ep ranks ─ all-to-all ─► [E / ep, ep · C, h]: this rank's experts, the rows of all ranks
      ─ each expert on its own ─► [E / ep, ep · C, h'] ─ all-to-all ─► [E, C, h']: this rank's rows again

Rank r of ep holds experts r · E / ep to (r + 1) · E / ep - 1. Lepikhin et al., GShard, arXiv 2006.16668.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.parallel.collectives import all_gather, all_reduce, gather_objects
from megazero.parallel.exchange import swap_parts
from megazero.parallel.topology import AxisGroup


class ExpertList(nn.ModuleList):
    """The experts of one layer that this rank holds, under their numbers among all `total` of them, so that names of
    parameters mean the same on every rank and in every checkpoint.

    Before `spread` it does not know its ranks: it holds the first `total / ep_size`, under the numbers 0, 1, …

    Args:
        experts: as many as this rank holds.
        total: E.
        ep_size: ranks over which they are to be spread; 1: each rank holds all.
    """

    def __init__(self, experts: Iterable[nn.Module], total: int, ep_size: int) -> None:
        super().__init__(experts)
        self.total, self.ep_size = total, ep_size
        self.group: AxisGroup | None = None
        """The ranks that hold all experts together; None while they are not known."""
        self._mark()
        self.register_state_dict_post_hook(_add_others)
        self.register_load_state_dict_pre_hook(_leave_out_others)

    def __getitem__(self, number: Any) -> Any:
        """The expert of this number. Raises KeyError for one that another rank holds."""
        return self._modules[str(number)]

    @property
    def numbers(self) -> list[int]:
        """Of the experts that are here."""
        return [int(name) for name in self._modules]

    def spread(self, group: AxisGroup) -> list[nn.Module]:
        """Be one of the group's ranks, and take this rank's numbers. Not collective.

        Returns the experts that were here and are other ranks'.
        """
        held, share = list(self), self.total // group.size
        first = group.rank * share
        kept = held[first : first + share] if len(held) == self.total else held
        assert len(kept) == share, f"{len(held)} of {self.total} experts on one of {group.size} ranks"
        self._modules.clear()
        self._modules.update({str(first + index): expert for index, expert in enumerate(kept)})
        self.group, self.ep_size = group, group.size
        self._mark()
        return [expert for expert in held if expert not in kept]

    def _mark(self) -> None:
        """As DeepSpeed marks experts' parameters."""
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = f"ep_size_{self.ep_size}"  # type: ignore[attr-defined]

    def agree(self, room: int, device: torch.device) -> int:
        """The largest of the ranks' rooms, with which rows travel. Collective.

        Raises ConfigError while the ranks are not known.
        """
        if self.ep_size == 1:
            return room
        if self.group is None:
            raise ConfigError(
                f"ep_size={self.ep_size}: this layer holds {len(self)} of its {self.total} experts, and does not know "
                "yet which ranks hold the others. Pass the model to megazero.initialize() and call the engine, or "
                "build it with ep_size=1."
            )
        return int(all_reduce(torch.tensor(room, device=device), self.group, "max"))

    def to_experts(self, rows: Tensor) -> Tensor:
        """[E, C, h] -> [E / ep, ep · C, h], the rows of rank 0 first. C is the same on all ranks. Collective."""
        if self.group is None or self.group.size == 1:
            return rows
        parts = swap_parts(rows.unflatten(0, (self.group.size, -1)), self.group)  # [ep, E / ep, C, h]
        return parts.transpose(0, 1).flatten(1, 2)

    def to_owners(self, rows: Tensor) -> Tensor:
        """[E / ep, ep · C, h'] -> [E, C, h']: the opposite. Collective."""
        if self.group is None or self.group.size == 1:
            return rows
        parts = rows.unflatten(1, (self.group.size, -1)).transpose(0, 1)  # [ep, E / ep, C, h']
        return swap_parts(parts, self.group).flatten(0, 1)


def spread_modules(model: nn.Module) -> set[nn.Module]:
    """The experts, and all modules inside them, that are spread over several ranks."""
    lists = [part for part in model.modules() if isinstance(part, ExpertList) and part.group is not None]
    return {part for experts in lists for expert in experts for part in expert.modules()}


@torch.no_grad()
def _add_others(experts: ExpertList, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Let a state dict hold all experts, in the order of their numbers. Collective over the ranks of ep."""
    group = experts.group
    if group is None or group.size == 1:
        return
    whole: dict[int, dict[str, Any]] = {number: {} for number in range(experts.total)}
    share, first = len(experts), experts.numbers[0]
    for number in experts.numbers:
        begins = f"{prefix}{number}."
        for name in [name for name in state_dict if name.startswith(begins)]:
            own, rest = state_dict.pop(name), name.removeprefix(begins)
            for rank, value in enumerate(_of_all_ranks(own, group)):
                whole[rank * share + number - first][rest] = own if rank == group.rank else value
    for number, entries in whole.items():
        state_dict.update({f"{prefix}{number}.{rest}": value for rest, value in entries.items()})


def _of_all_ranks(value: Any, group: AxisGroup) -> list[Any]:
    if not isinstance(value, Tensor):
        return gather_objects(value, group)
    sent = value.detach().unsqueeze(0)
    if value.dtype == torch.bool:
        return list(all_gather(sent.to(torch.uint8), group, 0).bool())
    return list(all_gather(sent, group, 0))


def _leave_out_others(
    experts: ExpertList, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """Take this rank's experts out of a state dict of all of them."""
    if experts.group is None:
        return
    others = {str(number) for number in range(experts.total)} - set(experts._modules)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if name.removeprefix(prefix).partition(".")[0] in others:
            del state_dict[name]
