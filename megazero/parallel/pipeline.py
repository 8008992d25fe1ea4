"""Pipeline parallelism: which stages a rank holds, and running them with torch.distributed.pipelining's schedules.

      tokens ─► stage 0 ─ hidden ─► stage 1 ─ hidden ─► … ─► last stage ─► loss sum        forward
                stage 0 ◄─ gradient ─ stage 1 ◄─ gradient ─ … ◄─ last stage                backward

A rank of the pp axis holds one stage, or several with the interleaved and V schedules. What is not hidden state
(tokens, labels, masks, document ids) goes to every stage as keyword tensors, the last stage computes the loss in its
forward, and gradients are not scaled: the caller divides by the number of tokens. Schedules: GPipe (arXiv 1811.06965),
1F1B and interleaved 1F1B (2104.04473), zero bubble and ZB-V (2401.10241), DualPipeV (2412.19437).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules

from megazero.parallel.collectives import Pending, broadcast, count_sends, receive, send
from megazero.parallel.topology import AxisGroup

Inputs = Mapping[str, Tensor]
Hidden = Tensor | tuple[Tensor, ...]
"""What goes from one stage to the next: one tensor, or two and more."""
Forward = Callable[[nn.Module, Inputs, Any], Any]
"""(stage, keyword tensors of a micro-batch, Hidden or None for the first stage) -> Hidden, or loss sum."""
Received = Callable[[Inputs, int], tuple[Tensor, ...]]
"""(tensors like those of a micro-batch, stage from 1) -> meta tensors like what this stage receives in forward."""

SINGLE: dict[str, type[schedules.PipelineScheduleSingle]] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
}
MULTI: dict[str, type[schedules.PipelineScheduleMulti]] = {
    "interleaved-1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
SPLIT_BACKWARD = frozenset({"interleaved-zero-bubble", "zbv", "dualpipev"})
"""Schedules that compute input gradients first and weight gradients later."""


@dataclass(frozen=True)
class LocalStage:
    """One stage that this rank holds."""

    number: int
    """Among all stages, in the order in which a token meets them."""
    module: nn.Module


class Pipeline:
    """Runs this rank's stages over the micro-batches of a step, together with the other ranks of the pp axis.

    Args:
        stages: this rank's, ascending.
        places: for every stage of the pipeline, the pp rank that holds it.
        schedule: a key of SINGLE (one stage a rank) or MULTI.
        example: meta tensors like those of one micro-batch.
        received: shapes, types and `requires_grad` of what travels between stages.
        forward: how a stage is called.
        weights_done: called with a stage's module after weight gradients were computed, which the split-backward
            schedules leave in `.grad` without firing hooks.
    """

    def __init__(
        self,
        stages: Sequence[LocalStage],
        places: Sequence[int],
        group: AxisGroup,
        *,
        schedule: str,
        micro_batches: int,
        example: Inputs,
        received: Received,
        forward: Forward,
        weights_done: Callable[[nn.Module], None],
        device: torch.device,
    ) -> None:
        self.stages, self.places, self.group, self.device = list(stages), list(places), group, device
        self.received, self.forward_stage, self.micro_batches = received, forward, micro_batches
        self._shapes = _shapes(example)
        self._doing = "before the first action"
        self._denominator = torch.ones((), device=device)
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        last = len(places) - 1
        runtime = [
            _Stage(
                _Called(stage.module, forward, first=stage.number == 0, last=stage.number == last),
                stage.number,
                len(places),
                device,
                input_args=received(example, stage.number) if stage.number else (),
                output_args=received(example, stage.number + 1) if stage.number < last else _LOSS,
                group=group.handle,
            )
            for stage in self.stages
        ]
        self.runtime = runtime
        for stage in runtime:
            stage.weights_done, stage.say = weights_done, self._say
            count_sends(stage, group)
        settings: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        if schedule in SINGLE:
            assert len(runtime) == 1, f"{schedule} runs one stage a rank, not {len(runtime)}"
            self.schedule: Any = SINGLE[schedule](runtime[0], micro_batches, **settings)
        else:
            self.schedule = MULTI[schedule](list(runtime), micro_batches, **settings)

    @property
    def has_first(self) -> bool:
        return self.stages[0].number == 0

    @property
    def has_last(self) -> bool:
        return self.stages[-1].number == len(self.places) - 1

    def fits(self, micro_batch: Inputs) -> bool:
        """Whether its tensors have the shapes and types for which this was made, as `train` needs them."""
        return _shapes(micro_batch) == self._shapes

    def train(self, micro_batches: Sequence[Inputs], denominator: Tensor) -> Tensor:
        """Forward and backward of every micro-batch with loss sum / denominator as the loss.

        Returns the sum of the losses before the division, fp64, on the rank with the last stage; 0 on the others.
        """
        assert len(micro_batches) == self.micro_batches
        self._denominator = denominator
        self._total = torch.zeros((), dtype=torch.float64, device=self.device)
        whole = {name: torch.cat([batch[name] for batch in micro_batches]) for name in micro_batches[0]}
        target = torch.zeros(self.micro_batches, device=self.device) if self.has_last else None
        with self._explained():
            self.schedule.step(target=target, return_outputs=False, **whole)
        return self._total

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Inputs]) -> list[Tensor]:
        """Each micro-batch through all stages, no backward; the last stage's results, on the rank that holds it.

        The micro-batches may have other shapes than in training.
        """
        local = {stage.number: stage.module for stage in self.stages}
        flowing: list[Any] = [None] * len(micro_batches)
        results: list[Tensor] = []
        sends: list[tuple[Pending, Tensor]] = []
        with self._explained():
            for number, place in enumerate(self.places):
                if number not in local:
                    continue
                source = self.places[number - 1] if number else place
                for index, batch in enumerate(micro_batches):
                    self._say(f"in evaluation, forward of micro-batch {index} in stage {number}")
                    hidden = flowing[index] if source == place else self._receive(batch, number, source)
                    out = self.forward_stage(local[number], batch, hidden)
                    if number == len(self.places) - 1:
                        results.append(out)
                    elif self.places[number + 1] == place:
                        flowing[index] = out
                    else:
                        tensors = [tensor.contiguous() for tensor in _tensors(out)]
                        sends += [(send(tensor, self.group, self.places[number + 1]), tensor) for tensor in tensors]
            for pending, _ in sends:
                pending.wait()
        return results

    def _receive(self, batch: Inputs, number: int, source: int) -> Hidden:
        """What the stage before sends for this micro-batch."""
        found = tuple(torch.empty_like(like, device=self.device) for like in self.received(batch, number))
        for tensor in found:
            receive(tensor, self.group, source)
        return found if len(found) > 1 else found[0]

    def from_last(self, value: Tensor) -> Tensor:
        """`value` as the rank with the last stage has it, in place on the other ranks of the pp axis."""
        return broadcast(value, self.group, self.places[-1])

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        self._total += output.detach().sum()
        return output.sum() / self._denominator

    def _say(self, doing: str) -> None:
        self._doing = doing

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """An error from within says where in the pipeline it happened: ranks that lose another one, too."""
        try:
            yield
        except Exception as error:
            mine = {stage.number for stage in self.stages}
            beside = sorted({n + step for n in mine for step in (-1, 1)} & set(range(len(self.places))) - mine)
            others = ", ".join(f"stage {n} on rank {self.group.ranks[self.places[n]]}" for n in beside)
            error.add_note(f"pipeline: rank {self.group.ranks[self.group.rank]} {self._doing}; it works with {others}")
            raise


class _Called(nn.Module):
    """A stage as the runtime calls it: positional hidden state (none at the first stage), keyword tensors."""

    def __init__(self, stage: nn.Module, forward: Forward, *, first: bool, last: bool) -> None:
        super().__init__()
        self.stage, self.run, self.first, self.last = stage, forward, first, last

    def forward(self, *hidden: Tensor, **inputs: Tensor) -> Any:
        out = self.run(self.stage, inputs, None if self.first else hidden if len(hidden) > 1 else hidden[0])
        return out.reshape(1) if self.last else out


class _Stage(pipelining.PipelineStage):
    """torch's stage, which says what it does, and when weight gradients were computed apart from input gradients."""

    weights_done: Callable[[nn.Module], None]
    say: Callable[[str], None]

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **keywords: Any) -> Any:
        with self._said("forward", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *arguments, **keywords)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **keywords: Any) -> None:
        with self._said("backward", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *arguments, **keywords)
            found = self.bwd_cache[bwd_chunk_id]  # as autograd left them; what is sent is to be contiguous
            self.bwd_cache[bwd_chunk_id] = tuple(None if g is None else g.contiguous() for g in found)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **keywords: Any) -> None:
        with self._said("weight half of the backward", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, *arguments, **keywords)
            self.weights_done(self.submod)

    @contextmanager
    def _said(self, operation: str, micro_batch: int) -> Iterator[None]:
        """Afterwards comes communication, which fails when another rank is gone."""
        action = f"the {operation} of micro-batch {micro_batch} in stage {self.stage_index}"
        self.say(f"in {action}")
        yield
        self.say(f"after {action}")


_LOSS = torch.empty(1, device="meta", requires_grad=True)


def _shapes(batch: Inputs) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()}


def _tensors(hidden: Hidden) -> tuple[Tensor, ...]:
    return hidden if isinstance(hidden, tuple) else (hidden,)
