"""`deepspeed.utils.groups`: the process groups of the engine that `deepspeed.initialize` made last.

    groups._get_data_parallel_group() ─► last engine (held weakly) ─► engine.topology.process_group("dp")

    tensor  tp        data      dp         sequence       cp          expert       ep
    model   pp · tp                        sequence data  dp · cp     expert data  expert_dp

Before `initialize` names with an underscore say what DeepSpeed says then: all ranks are one data-parallel group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from megazero.base.errors import ConfigError
from megazero.engine.engine import Engine
from megazero.integrations.deepspeed_comm import get_rank, get_world_size
from megazero.parallel.topology import Topology


def _nothing() -> Engine | None:
    return None


class Last:
    """DeepSpeed's interface is global, so this is; nothing else of megazero reads it."""

    engine: Callable[[], Engine | None] = staticmethod(_nothing)


def remember(engine: Engine) -> None:
    """Answer for this engine from now on, as long as it lives."""
    Last.engine = weakref.ref(engine)


def topology() -> Topology | None:
    """Of the last engine; None before there is one, and after it is gone."""
    engine = Last.engine()
    return None if engine is None else engine.topology


@dataclass(frozen=True)
class Axis:
    """One kind of group. Before `initialize` its methods raise ConfigError where DeepSpeed has no answer either."""

    name: str
    """The topology's."""
    before: Literal["unknown", "rank", "world"] = "unknown"
    """Who is in it before `initialize`. Only `world` is a process group then."""

    def group(self) -> dist.ProcessGroup:
        """The process group, a real one also where it has one member."""
        found = topology()
        if found is None and self.before != "world":
            raise self._unknown()
        if not dist.is_initialized():
            raise ConfigError(
                "deepspeed.utils.groups: this process has joined no process group. Call deepspeed.init_distributed() "
                "or deepspeed.initialize(…) first."
            )
        whole = dist.group.WORLD
        assert whole is not None
        return whole if found is None else found.process_group(self.name)

    def ranks(self) -> list[int]:
        """Global ranks of its members."""
        found = topology()
        if found is not None:
            return list(found.group(self.name).ranks)
        if self.before == "unknown":
            raise self._unknown()
        return list(range(get_world_size())) if self.before == "world" else [get_rank()]

    def rank(self) -> int:
        """This process's place among its members."""
        return self.ranks().index(get_rank())

    def world_size(self) -> int:
        return len(self.ranks())

    def source(self) -> int:
        """Global rank of its first member, from which it broadcasts."""
        return self.ranks()[0]

    def _unknown(self) -> ConfigError:
        return ConfigError(
            f"deepspeed.utils.groups: which ranks are this one's {self.name} group is not known before "
            "deepspeed.initialize(…), nor once its engine is gone. Ask while there is an engine."
        )


class ExpertAxis(Axis):
    """The same, asked for by DeepSpeed's name of the group: `ep_size_4` where experts are spread over 4 ranks."""

    def named_group(self, group_name: str) -> dist.ProcessGroup:
        self._check(group_name)
        return self.group()

    def named_ranks(self, group_name: str) -> list[int]:
        self._check(group_name)
        return self.ranks()

    def named_rank(self, group_name: str) -> int:
        self._check(group_name)
        return self.rank()

    def named_world_size(self, group_name: str) -> int:
        self._check(group_name)
        return self.world_size()

    def named_source(self, group_name: str) -> int:
        self._check(group_name)
        return self.source()

    def by_name(self) -> dict[str, dist.ProcessGroup]:
        return {expert_group_name(): self.group()}

    def _check(self, group_name: str) -> None:
        if group_name != expert_group_name():
            raise ConfigError(
                f"deepspeed.utils.groups: there is no expert group {group_name!r}; experts are spread over "
                f"{_EXPERT.world_size()} ranks here. Ask for {expert_group_name()!r}."
            )


def expert_group_name() -> str:
    """DeepSpeed's name of the one expert group that a topology has."""
    return f"ep_size_{_EXPERT.world_size()}"


_EXPERT, _EXPERT_DATA = ExpertAxis("ep"), ExpertAxis("expert_dp")
_MODEL, _TENSOR, _DATA = Axis("model"), Axis("tp"), Axis("dp")
_ANY_DATA, _ANY_SEQUENCE_DATA = Axis("dp", "world"), Axis("zero", "world")
_ANY_MODEL, _ANY_SEQUENCE = Axis("model", "rank"), Axis("cp", "rank")

# DeepSpeed's names

get_data_parallel_group, get_data_parallel_rank = _DATA.group, _DATA.rank
get_data_parallel_world_size = _DATA.world_size
get_model_parallel_group, get_model_parallel_rank = _MODEL.group, _MODEL.rank
get_model_parallel_world_size = _MODEL.world_size
get_tensor_model_parallel_group, get_tensor_model_parallel_rank = _TENSOR.group, _TENSOR.rank
get_tensor_model_parallel_world_size, get_tensor_model_parallel_src_rank = _TENSOR.world_size, _TENSOR.source

_get_data_parallel_group, _get_data_parallel_group_ranks = _ANY_DATA.group, _ANY_DATA.ranks
_get_data_parallel_rank, _get_data_parallel_world_size = _ANY_DATA.rank, _ANY_DATA.world_size
_get_model_parallel_world_size = _ANY_MODEL.world_size
_get_sequence_parallel_group, _get_sequence_parallel_rank = _ANY_SEQUENCE.group, _ANY_SEQUENCE.rank
_get_sequence_parallel_world_size = _ANY_SEQUENCE.world_size
_get_sequence_data_parallel_group, _get_broadcast_src_rank = _ANY_SEQUENCE_DATA.group, _ANY_SEQUENCE_DATA.source
_get_sequence_data_parallel_rank = _ANY_SEQUENCE_DATA.rank
_get_sequence_data_parallel_world_size = _ANY_SEQUENCE_DATA.world_size

_get_expert_parallel_group, _get_expert_parallel_group_ranks = _EXPERT.named_group, _EXPERT.named_ranks
_get_expert_parallel_rank, _get_expert_parallel_world_size = _EXPERT.named_rank, _EXPERT.named_world_size
_get_expert_parallel_src_rank, _get_expert_parallel_group_dict = _EXPERT.named_source, _EXPERT.by_name
_get_expert_data_parallel_group = _EXPERT_DATA.named_group
_get_expert_data_parallel_group_ranks = _EXPERT_DATA.named_ranks
_get_expert_data_parallel_rank = _EXPERT_DATA.named_rank
_get_expert_data_parallel_world_size = _EXPERT_DATA.named_world_size
_get_expert_data_parallel_group_dict = _EXPERT_DATA.by_name
_get_expert_broadcast_src_rank = _EXPERT_DATA.named_source
_get_max_expert_size, _get_max_expert_size_name = _EXPERT.world_size, expert_group_name
_get_max_expert_parallel_group = _EXPERT.group
