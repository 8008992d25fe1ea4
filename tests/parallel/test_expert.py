"""ExpertList: who holds which number, and where rows go."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megazero.base.errors import ConfigError
from megazero.parallel.expert import ExpertList, spread_modules
from megazero.parallel.topology import AxisGroup, Topology
from tests.harness import Ranks

E, H = 4, 3


def experts(held: int = E, ep_size: int = 1) -> ExpertList:
    return ExpertList([nn.Linear(H, H) for _ in range(held)], E, ep_size)


@pytest.mark.parametrize("held", [E, 2])
def test_a_rank_takes_its_numbers(held: int) -> None:
    listed = experts(held, E // held)
    before, names = list(listed), listed.numbers
    gone = listed.spread(AxisGroup("ep", (4, 5), 1, None))
    assert names == list(range(held)) and listed.numbers == [2, 3] and len(listed) == 2
    assert listed[2] is before[-2] and listed[3] is before[-1] and gone == before[:-2]
    assert [name for name, _ in listed.named_parameters()] == ["2.weight", "2.bias", "3.weight", "3.bias"]
    assert {p.group_name for p in listed.parameters()} == {"ep_size_2"} and listed.ep_size == 2
    assert not any(p.allreduce for p in listed.parameters())
    assert spread_modules(nn.Sequential(listed)) == {listed[2], listed[3]} and not spread_modules(experts())
    with pytest.raises(KeyError):
        listed[0]
    listed.spread(AxisGroup("ep", (4, 5), 1, None))  # again, with the groups of another engine
    assert listed.numbers == [2, 3]


def test_before_its_ranks_are_known() -> None:
    assert experts().agree(7, torch.device("cpu")) == 7
    with pytest.raises(ConfigError, match=r"ep_size=2: this layer holds 2 of its 4 experts.*megazero\.initialize"):
        experts(2, 2).agree(7, torch.device("cpu"))


def check_way(ep: int) -> None:
    """Each row says who sent it, for which expert, and which it is."""
    group, rank, room = Topology.build(ep=ep).group("ep"), dist.get_rank(), 2
    listed = experts(E // ep, ep)
    listed.spread(group)
    assert listed.agree(5 + group.rank, torch.device("cpu")) == 4 + ep
    rows = torch.stack(
        torch.meshgrid(torch.tensor(float(rank)), torch.arange(4.0), torch.arange(2.0), indexing="ij"), -1
    )
    rows = rows[0].requires_grad_()  # [E, C, 3]
    got = listed.to_experts(rows)
    assert got.shape == (E // ep, ep * room, H)
    for index, number in enumerate(listed.numbers):
        wanted = [[sender, number, place] for sender in group.ranks for place in range(room)]
        assert got[index].tolist() == wanted
    back = listed.to_owners(got * 2)
    assert torch.equal(back, rows * 2)
    (gradient,) = torch.autograd.grad((back * rows.detach()).sum(), rows)
    assert torch.equal(gradient, 2 * rows)


@pytest.mark.parametrize("ep", [2, 4])
def test_rows_go_to_their_experts_and_back(ranks: Ranks, ep: int) -> None:
    ranks.run(check_way, 4, ep)
