"""The torch optimizer over ZeRO's shards.

Each owned part of a bucket is cut where the parameter group changes; each cut is one flat Parameter, a view of the fp32
master, whose `.grad` is a view of the reduced gradients. Any element-wise torch optimizer can step on these. Where
some parameters of a cut have no gradient in a step it is divided for good (cuts.py), and torch skips what has none.

    at hand:     scale all gradients ─► one step ─► cast, gather
    elsewhere:   bucket by bucket: [read the next] gradients in fp32 where the master is ─► step ─► cast, gather [write]

"Elsewhere" is 16-bit gradients, and state in CPU memory beside a GPU or on NVMe.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from megazero.base.errors import CheckpointError, ConfigError
from megazero.config.schema import OptimizerConfig
from megazero.engine.cuts import Cut, divided, per_element
from megazero.engine.optimizers.cuts import repoint
from megazero.engine.optimizers.element_wise import element_wise_problem
from megazero.engine.optimizers.make import make_optimizer
from megazero.engine.sharded import Shard
from megazero.engine.state_files import StateFiles
from megazero.parallel.collectives import all_reduce
from megazero.parallel.topology import AxisGroup
from megazero.zero.buckets import Bucket, Placed
from megazero.zero.zero import Zero

Piece = tuple[Bucket, int, Tensor]


class ShardOptimizer:
    """Steps the owned masters. `optimizer` is a torch.optim.Optimizer over the cuts.

    Args:
        source: settings; or an optimizer over the module's parameters, whose groups are filled with cuts of them
            instead.

    Raises ValueError for an optimizer that has stepped already.
    """

    def __init__(self, zero: Zero, source: OptimizerConfig | torch.optim.Optimizer) -> None:
        self.zero = zero
        self.optimizer = _from_config(zero, source) if isinstance(source, OptimizerConfig) else source
        if any(self.optimizer.state.values()) and not isinstance(self.optimizer, torch.optim.Adagrad):
            raise ValueError(
                "the optimizer holds state of steps that it has made, which cannot be cut into shards. Pass a new one, "
                "and load its state from a checkpoint with engine.load_checkpoint."
            )
        self.whole = bool(getattr(self.optimizer, "whole_tensors", False))
        if not self.whole and (problem := element_wise_problem(self.optimizer)) is not None:
            raise ConfigError(problem)
        index = {p: number for number, group in enumerate(self.optimizer.param_groups) for p in group["params"]}

        def key(place: Placed) -> object:
            number = index[place.parameter]
            return (number, place.name) if self.whole else (number, "")

        self._given = [list(group["params"]) for group in self.optimizer.param_groups]
        groups: list[list[nn.Parameter]] = [[] for _ in self.optimizer.param_groups]
        self._by_bucket: dict[int, list[Cut]] = {id(bucket): [] for bucket in zero.buckets}
        for bucket, _, start, stop in zero.segments(key):
            place = next(iter(bucket.parts(start, stop)))[0]
            shown = torch.zeros((), device=bucket.place.state_device).expand(stop - start)  # a master in a file
            cut = Cut(bucket, start, stop, nn.Parameter(shown), place)
            if bucket.master_in_memory:
                cut.flat.data = cut.part_of(bucket.master)
            self._by_bucket[id(bucket)].append(cut)
            groups[index[place.parameter]].append(cut.flat)
        repoint(self.optimizer, groups)
        self.torn = False
        """An update ended half-way: some masters and states are of the next step, others not."""
        self.files = StateFiles()
        self._put_filed()  # what was started already: Adagrad's sums
        self.at_hand = all(
            b.grad_dtype == torch.float32 and b.reduced.device == b.place.state_device and not self._is_filed(b)
            for b in zero.buckets
        )

    @property
    def cuts(self) -> list[Cut]:
        """Of all buckets."""
        return [cut for cuts in self._by_bucket.values() for cut in cuts]

    def _is_filed(self, bucket: Bucket) -> bool:
        return bucket.place.state_store is not None or not bucket.master_in_memory

    def _put_filed(self) -> None:
        """Put states that were made outside a step into their files."""
        for bucket in self.zero.buckets:
            if self._is_filed(bucket):
                self.files.put(bucket, self._by_bucket[id(bucket)], self.optimizer, wait=True)

    # the update

    @torch.no_grad()
    def step(self, factor: float, *, unused: bool = False) -> None:
        """One update of the weights with the reduced gradients times `factor`, and the new weights to all ranks.

        Args:
            unused: some rank had parameters without a gradient. Those without one on every rank stay as they are.

        Raises CheckpointError after an update that ended half-way, until states are loaded from a checkpoint.
        """
        self.check_whole()
        idle = self._used_nowhere() if unused else set()
        buckets = list(enumerate(self.zero.buckets))[::-1]  # the order in which forward needs them
        if self.at_hand:
            for _, bucket in buckets:
                if factor != 1.0:
                    bucket.reduced.mul_(factor)
                self._give_gradients(bucket, bucket.reduced, idle)
            self.torn = True
            self._step_cuts(self.cuts, None)
            self.torn = False
            self.zero.publish()
        else:
            self.torn = True
            self._step_in_turn(buckets, factor, idle)
            self.torn = False
        for cut in self.cuts:
            cut.flat.grad = None

    def _step_in_turn(self, buckets: list[tuple[int, Bucket]], factor: float, idle: set[nn.Parameter]) -> None:
        """Bucket by bucket. A bucket's update must not see that others came before it in this step."""
        before = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        counts = {k: v for k, v in vars(self.optimizer).items() if isinstance(v, int | float)}
        pipelined = self.zero.homes.pipelined
        for position, (index, bucket) in enumerate(buckets):
            self.files.fetch(bucket, self._by_bucket[id(bucket)], self.optimizer)
            if pipelined and position + 1 < len(buckets):
                following = buckets[position + 1][1]
                self.files.prefetch(following, self._by_bucket[id(following)], self.optimizer)
            gradient = bucket.reduced.to(device=bucket.place.state_device, dtype=torch.float32)
            if factor != 1.0:
                gradient = gradient.mul_(factor) if gradient is not bucket.reduced else gradient * factor
            cuts = self._give_gradients(bucket, gradient, idle)
            for group, values in zip(self.optimizer.param_groups, before, strict=True):
                group.update(values)
            vars(self.optimizer).update(counts)
            self._step_cuts(cuts, index)
            for cut in cuts:
                cut.flat.grad = None
            self.zero.publish_bucket(index, self.files.master(bucket))
            self.files.put(bucket, cuts, self.optimizer, wait=not pipelined)
        self.files.settle()
        self.zero.end_publish()

    def _step_cuts(self, cuts: Sequence[Cut], part: int | None) -> None:
        """Update these cuts: all of the optimizer's, or those of bucket `part`."""
        if not self.whole:
            self.optimizer.step()
            return
        shards: dict[AxisGroup, list[Shard]] = {group: [] for group in self._groups(part)}
        group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        for cut in cuts:
            spec, first = cut.place.spec, cut.place.start
            master, gradient, state = cut.flat.detach(), cut.flat.grad, self.optimizer.state[cut.flat]
            if gradient is None:  # all ranks list the same shards in every step: a copy goes along, and is forgotten
                gradient, master, state = torch.zeros_like(master), master.clone(), copy.deepcopy(state)
            shards[self._over(cut.bucket)].append(
                Shard(
                    spec.name,
                    spec.local_shape,
                    cut.start - first,
                    cut.stop - first,
                    master,
                    gradient,
                    group_of[cut.flat],
                    state,
                    split=spec.local_shape != spec.shape,
                )
            )
        for group, listed in shards.items():
            self.optimizer.step_sharded(listed, group, (part, group.axis))  # type: ignore[attr-defined]

    def _groups(self, part: int | None) -> list[AxisGroup]:
        """The groups over which a part's parameters are cut, in the order in which all ranks go through them."""
        buckets = self.zero.buckets if part is None else [self.zero.buckets[part]]
        return list(dict.fromkeys(map(self._over, buckets)))

    def _over(self, bucket: Bucket) -> AxisGroup:
        return bucket.group if self.zero.lifetimes.optimizer_sharded else self.zero.topology.subgroup("zero", 1)

    # parameters without a gradient

    def _used_nowhere(self) -> set[nn.Parameter]:
        """Parameters that had no gradient on any rank since the last step. Collective."""
        filled = self.zero.reduction.ever_filled
        places: dict[AxisGroup, list[Placed]] = {}
        for bucket in self.zero.buckets:
            places.setdefault(bucket.group, []).extend(bucket.placed)
        idle: set[nn.Parameter] = set()
        for group, listed in places.items():
            used = torch.tensor([float(place.parameter in filled) for place in listed], device=self.zero.device)
            all_reduce(used, group, "max")
            idle.update(p.parameter for p, any_rank in zip(listed, used.tolist(), strict=True) if not any_rank)
        return idle

    def _give_gradients(self, bucket: Bucket, gradient: Tensor, idle: set[nn.Parameter]) -> list[Cut]:
        """Let the bucket's cuts have their parts of `gradient` [owned], but those of idle parameters; its cuts now."""
        if idle and not self.whole:  # whose cuts are of one parameter each
            self._divide(bucket, lambda place: place.parameter in idle)
        cuts = self._by_bucket[id(bucket)]
        for cut in cuts:
            cut.flat.grad = None if cut.place.parameter in idle else cut.part_of(gradient)
        return cuts

    def _divide(self, bucket: Bucket, key: Callable[[Placed], object]) -> None:
        """From now on no cut of the bucket holds parameters of different keys."""
        cuts = self._by_bucket[id(bucket)]
        cuts[:] = [part for cut in cuts for part in divided(cut, key, self.optimizer)]

    # checkpoints

    def check_whole(self) -> None:
        """Raise CheckpointError for masters and states that are partly of one step and partly of the next."""
        if self.torn:
            raise CheckpointError(
                "an earlier step() ended with an error half-way, so that weights and optimizer states are partly those "
                "before it and partly those after it. Resume from the last checkpoint: load_checkpoint() with the "
                "optimizer's states, or in a new process."
            )

    def state_keys(self) -> list[str]:
        """Names of the per-element states that exist, e.g. exp_avg and exp_avg_sq; empty before the first step."""
        for cut in self.cuts:
            for key, value in self._state(cut).items():
                if per_element(value) and (type(value) is not Tensor or value.numel() not in (0, cut.stop - cut.start)):
                    raise ConfigError(
                        f"the state {key!r} of {type(self.optimizer).__name__} is not one number an element, so it "
                        "cannot be saved for other layouts. Save the weights alone, or train with AdamW instead of its "
                        "8-bit form."
                    )
        return sorted({key for cut in self.cuts for key, value in self._state(cut).items() if per_element(value)})

    def numbers(self) -> dict[str, dict[str, float] | None]:
        """By parameter of which this rank holds elements: its states that are one number, such as the step count; None
        for a parameter without any state."""
        found: dict[str, dict[str, float] | None] = {}
        for cut in self.cuts:
            state = self._state(cut)
            known = {k: float(v) for k, v in state.items() if v is not None and not per_element(v)} if state else None
            found.update((place.spec.name, known) for place in cut.places())
        return found

    def scalars(self) -> dict[str, float]:
        """Those of most parameters that this rank holds."""
        return most_common(numbers for numbers in self.numbers().values() if numbers is not None)

    def buffers(self, key: str) -> list[Piece]:
        """One per-element state of all cuts that have it, as `Zero.pieces` takes them."""
        return [
            (cut.bucket, cut.start, self.files.mapped(cut, key, state[key]))
            for cut in self.cuts
            if key in (state := self._state(cut))
        ]

    def prepare(
        self,
        keys: Collection[str],
        scalars: Mapping[str, float],
        apart: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
        without: Collection[str] = (),
    ) -> None:
        """Make zeroed states of these names, to load a checkpoint into.

        Args:
            keys: per-element states.
            scalars: those that are one number.
            apart: other scalars of some parameters, by name.
            without: names of parameters that have no state yet.
        """
        absent = frozenset(without)

        def numbers_of(place: Placed) -> Mapping[str, float] | None:
            return None if (name := place.spec.name) in absent else apart.get(name, scalars)

        self.files.forget()
        self.optimizer.state.clear()
        self.torn = False
        for bucket in self.zero.buckets:
            self._divide(bucket, numbers_of)
        names_of = getattr(self.optimizer, "state_names", lambda group: set(keys))
        expected = {p: names_of(group) for group in self.optimizer.param_groups for p in group["params"]}
        for cut in self.cuts:
            if (numbers := numbers_of(cut.place)) is None:
                continue
            mine = [key for key in keys if key in expected[cut.flat]]
            zeros = {key: torch.zeros(cut.stop - cut.start, device=cut.flat.device) for key in mine}
            made = {key: torch.tensor(value, dtype=torch.float32) for key, value in numbers.items()}
            self.optimizer.state[cut.flat] = zeros | {k: v.to(cut.flat.device) for k, v in made.items()}
        self._put_filed()

    def release(self) -> None:
        """Free the states, and give the optimizer back the parameters that it was made over. It starts anew then."""
        self.files.settle()
        self.optimizer.state = defaultdict(dict)
        for group, given in zip(self.optimizer.param_groups, self._given, strict=True):
            group["params"] = given
        for cut in self.cuts:
            cut.flat.data = torch.empty(0)
        self._by_bucket, self.files = {}, StateFiles()
        del self.zero

    def _state(self, cut: Cut) -> dict[str, Any]:
        return dict(self.optimizer.state.get(cut.flat, {}))


def most_common(numbers: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of these the most frequent, the first of several; {} of none."""
    counted = Counter(tuple(sorted(each.items())) for each in numbers)
    return dict(counted.most_common(1)[0][0]) if counted else {}


def decays_weight(place: Placed) -> bool:
    """Whether weight decay applies: not to biases and other 1-D parameters (Megatron's rule)."""
    return len(place.spec.shape) > 1


def _from_config(zero: Zero, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the module's parameters, biases and norms without weight decay."""
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for bucket in zero.buckets:
        for place in bucket.placed:
            groups[decays_weight(place)].append((place.name, place.parameter))
    listed = [
        {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
        for decays, members in groups.items()
        if members
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    arguments: dict[str, Any] = {"lr": config.lr}
    match config.optimizer:
        case "adam":
            name = "AdamW" if config.decoupled_weight_decay else "Adam"
            arguments |= {"betas": betas, "eps": config.adam_eps}
        case "sgd":
            name, arguments = "SGD", arguments | {"momentum": config.sgd_momentum}
        case "lion":
            name, arguments = "Lion", arguments | {"betas": betas}
        case "lamb" | "muon" | "adam8bit" as other:
            name = {"lamb": "Lamb", "muon": "Muon", "adam8bit": "AdamW8bit"}[other]
            arguments |= {"betas": betas, "eps": config.adam_eps}
        case "adagrad":
            name = "Adagrad"
    return make_optimizer(name, listed, arguments)
