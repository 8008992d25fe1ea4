"""A mixture of experts around any module, with the interface of DeepSpeed's MoE layer, on one rank or spread over some.

    x [tokens, h] ─ gate, fp32 ─► probabilities [tokens, E] ─ top k ─► k experts a token, at most C tokens an expert
      ─ gather ─► rows [E, C, h] ─ expert e on rows[e] ─► [E, C, h'] ─ gather, weight, sum over k ─► [tokens, h']
                    └ ep_size > 1: to the rank of expert e, with the rows of the other ranks, and back ┘

C = ceil(tokens · k / E · capacity factor). Capacity and auxiliary loss: Lepikhin et al., GShard, arXiv 2006.16668;
top 1: Fedus et al., Switch Transformer, arXiv 2101.03961; the dense branch (`use_residual`): Rajbhandari et al.,
DeepSpeed-MoE, arXiv 2201.05596.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.parallel.expert import ExpertList

NOISES = (None, "None", "Jitter", "RSample")
JITTER = 1e-2


class MoE(nn.Module):
    """`(x [..., h]) -> (output [..., h'], l_aux, exp_counts [E])`.

    `l_aux` is the loss that balances the experts: add it to yours, times about 0.01. `exp_counts` is how many tokens
    chose each expert, before any was dropped. Both, and the room of an expert, are of this rank's own tokens.

    Args:
        hidden_size: h.
        expert: [..., h] -> [..., h'] (or a tuple that begins with that); every expert starts as a copy of it.
        num_experts: E.
        ep_size: ranks over which the experts are spread; 1: each rank holds all, unless the configuration given to
            `initialize()` spreads them. The layer then runs in an engine only.
        k: experts a token.
        capacity_factor, eval_capacity_factor: room of an expert over a perfectly even load, in training and in eval.
        min_capacity: least room of an expert, in tokens.
        use_residual: mix in a dense copy of the expert, weighted by a learned softmax of two.
        noisy_gate_policy: in training, "Jitter": the gate sees x times 1 ± 0.01; "RSample": experts are drawn (Gumbel
            noise on the logits) rather than the best taken.
        drop_tokens: leave out what is over an expert's room; otherwise the room grows to what is needed.
        use_rts: k = 1: who is left out is drawn; otherwise the last in the batch. (k = 2: second choices before first,
            then the last; k > 2: the least probable.)
        top2_2nd_expert_sampling: k = 2: the second expert is drawn in training.

    Raises ConfigError for impossible sizes and for what this layer cannot do; in forward for experts that are to be
    spread and are not yet.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        _check(num_experts, ep_size, k, noisy_gate_policy, use_tutel, enable_expert_tensor_parallelism)
        self.num_experts, self.k, self.drop_tokens = num_experts, k, drop_tokens
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.noise, self.use_rts = min_capacity, noisy_gate_policy, use_rts
        self.sample_second = top2_2nd_expert_sampling
        self.deepspeed_moe = _Parts(hidden_size, expert, num_experts, ep_size)
        self.mlp = copy.deepcopy(expert) if use_residual else None
        self.coefficient = nn.Linear(hidden_size, 2) if use_residual else None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        probabilities, experts = self._choose(x)
        counts = torch.bincount(experts.flatten(), minlength=self.num_experts)
        room = self._room(x.shape[0], counts)
        places = self._places(probabilities, experts)
        kept = places < room
        weights = probabilities.gather(1, experts) * kept
        if self.k > 1:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
        wide = self.deepspeed_moe.experts.deepspeed_experts.agree(room, x.device)
        slots = torch.where(kept, experts * wide + places, self.num_experts * wide)
        output = self._run(x, slots, weights, wide).reshape(*hidden_states.shape[:-1], -1)
        if self.mlp is not None and self.coefficient is not None:
            share = self.coefficient(hidden_states).softmax(-1)
            output = output * share[..., :1] + _first(self.mlp(hidden_states)) * share[..., 1:]
        return output, self._balance(probabilities, experts), counts

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [tokens, E] in fp32, and each token's experts [tokens, k], the first choice first."""
        gate = x.float()
        if self.training and self.noise == "Jitter":
            gate = gate * torch.empty_like(gate).uniform_(1 - JITTER, 1 + JITTER)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(gate, self.deepspeed_moe.gate.wg.weight.float())
        wish = logits.detach()
        if self.training and self.noise == "RSample":
            wish = wish + _gumbel(wish)
        if self.k == 2 and self.training and self.sample_second and self.noise != "RSample":
            first = wish.argmax(1, keepdim=True)
            second = (wish + _gumbel(wish)).scatter(1, first, -torch.inf).argmax(1, keepdim=True)
            return logits.softmax(1), torch.cat([first, second], 1)
        return logits.softmax(1), wish.topk(self.k, dim=1).indices

    def _room(self, tokens: int, counts: Tensor) -> int:
        """C, in tokens."""
        if not self.drop_tokens:
            return int(counts.max())
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        room = math.ceil(tokens * self.k / self.num_experts * factor)
        return min(max(room, self.min_capacity), tokens)

    @torch.no_grad()
    def _places(self, probabilities: Tensor, experts: Tensor) -> Tensor:
        """Each choice's place in its expert's row, by priority: [tokens, k]."""
        choices = experts.T.flatten()  # all first choices, then all second ones, …
        if self.k == 1 and self.use_rts and self.training:
            order = torch.randperm(choices.numel(), device=choices.device)
        elif self.k > 2:
            order = probabilities.gather(1, experts).T.flatten().argsort(descending=True, stable=True)
        else:
            order = torch.arange(choices.numel(), device=choices.device)
        chosen = F.one_hot(choices[order], self.num_experts)
        places = torch.empty_like(choices)
        places[order] = (chosen.cumsum(0) * chosen).sum(1) - 1
        return places.view(self.k, -1).T

    def _run(self, x: Tensor, slots: Tensor, weights: Tensor, room: int) -> Tensor:
        """The weighted sum of what the experts make of x: [tokens, h']. Collective over the ranks of spread experts.

        The slot after the last is for what is dropped. Every expert runs, on zeros if need be, so that all ranks have
        gradients of the same parameters.
        """
        held = self.deepspeed_moe.experts.deepspeed_experts
        rows = x.new_zeros(self.num_experts * room + 1, x.shape[-1])
        rows = rows.index_copy(0, slots.T.flatten(), x.repeat(self.k, 1))[:-1].view(self.num_experts, room, -1)
        rows = held.to_experts(rows)
        made = torch.stack([_first(expert(rows[index])) for index, expert in enumerate(held)])
        out = F.pad(held.to_owners(made).flatten(0, 1), (0, 0, 0, 1))
        return (out[slots] * weights.to(out.dtype).unsqueeze(-1)).sum(1)

    def _balance(self, probabilities: Tensor, experts: Tensor) -> Tensor:
        """E · Σ over experts of mean probability × share of the tokens: 1 when the load is even."""
        counted = experts[:, :1] if self.k <= 2 else experts
        share = F.one_hot(counted, self.num_experts).float().mean((0, 1))
        return (probabilities.mean(0) * share).sum() * self.num_experts


class _Gate(nn.Module):
    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(hidden_size, num_experts, bias=False)


class _Experts(nn.Module):
    def __init__(self, expert: nn.Module, num_experts: int, ep_size: int) -> None:
        super().__init__()
        copies = [copy.deepcopy(expert) for _ in range(num_experts // ep_size)]
        self.deepspeed_experts = ExpertList(copies, num_experts, ep_size)


class _Parts(nn.Module):
    """Gate and experts, under the names that DeepSpeed's checkpoints use."""

    def __init__(self, hidden_size: int, expert: nn.Module, num_experts: int, ep_size: int) -> None:
        super().__init__()
        self.gate, self.experts = _Gate(hidden_size, num_experts), _Experts(expert, num_experts, ep_size)


def is_moe_param(parameter: Tensor) -> bool:
    """Whether it is an expert's."""
    return not getattr(parameter, "allreduce", True)


def has_moe_layers(module: nn.Module) -> tuple[bool, int]:
    """Whether there is a MoE in it, and the number of experts of the first one (0 if not)."""
    found = next((part for part in module.modules() if isinstance(part, MoE)), None)
    return found is not None, 0 if found is None else found.num_experts


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | tuple[dict[str, Any], ...] | list[dict[str, Any]],
    max_group_size: float | None = 178956971,
) -> list[dict[str, Any]]:
    """Groups with the experts' parameters in groups of their own (marked `moe`, with the other settings of the group
    they came from), one `ep_size` each, of at most `max_group_size` elements unless one parameter is larger."""
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    dense, moe = [], []
    for group in groups:
        parameters = list(group["params"])
        dense.append(group | {"params": [p for p in parameters if not is_moe_param(p)]})
        chunks = _chunks([p for p in parameters if is_moe_param(p)], max_group_size or math.inf)
        moe += [group | {"params": chunk, "moe": True, "name": chunk[0].group_name} for chunk in chunks]
    return dense + moe


def _chunks(parameters: list[Any], most: float) -> list[list[Any]]:
    chunks: list[list[Any]] = []
    size = math.inf
    for parameter in sorted(parameters, key=lambda parameter: parameter.group_name):
        if size + parameter.numel() > most or chunks[-1][-1].group_name != parameter.group_name:
            chunks.append([])
            size = 0
        chunks[-1].append(parameter)
        size += parameter.numel()
    return chunks


def _first(output: Any) -> Tensor:
    """What an expert returned, or the first of it."""
    made: Tensor = output[0] if isinstance(output, tuple) else output
    return made


def _gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


def _check(
    num_experts: int, ep_size: int, k: int, noise: str | None, use_tutel: bool, expert_tensor_parallel: bool
) -> None:
    if not 1 <= k <= num_experts:
        raise ConfigError(f"k={k} with num_experts={num_experts}: a token takes 1 to {num_experts} experts. Change k.")
    if ep_size < 1 or num_experts % ep_size:
        fits = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise ConfigError(
            f"ep_size={ep_size} with num_experts={num_experts}: each of the ranks holds equally many experts. Use an "
            f"ep_size out of {fits}."
        )
    if noise not in NOISES:
        raise ConfigError(f"noisy_gate_policy={noise!r} is none of None, 'Jitter', 'RSample'. Use one of these.")
    if use_tutel:
        raise ConfigError("use_tutel=True: megazero does not use Tutel's kernels. Leave it out.")
    if expert_tensor_parallel:
        raise ConfigError(
            "enable_expert_tensor_parallelism=True: these experts are not split over tensor-parallel ranks. Leave it "
            "out."
        )
