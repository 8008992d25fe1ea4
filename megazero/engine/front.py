"""DeepSpeed's front of the engine: `engine(batch)`, `engine.backward(loss)`, `engine.step()`, and a batch at a time.

micro-batch 0    forward ─► backward ─► step()   counts
micro-batch 1    forward ─► backward ─► step()   boundary: reduce, update, scheduler, print
                          └ gradients add up in ZeRO's buckets; plain loss.backward() does the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from megazero.base.errors import ConfigError
from megazero.engine.batches import call, loss_in, named_micro_batch, refuse_unlike
from megazero.engine.parts import Parts
from megazero.engine.precision import scaled_outputs
from megazero.engine.update import Divisors, StepResult
from megazero.parallel.collectives import all_reduce
from megazero.parallel.pipeline import Pipeline
from megazero.parallel.pipeline_module import PipelineModule


class Front(Parts):
    """See the module."""

    # the loop of initialize(): forward, backward, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, in the engine's precision.

        In fp16 the outputs carry the loss scale, so that a plain `loss.backward()` is scaled: what a loss has beside
        these outputs (a penalty on weights, say) is not then. `engine.backward(loss)` scales all of it.
        """
        self._refuse_pipeline("engine(…)")
        self.zero.sync = self.accumulation.reduces_now
        self._loss_is_scaled = False
        with self.timers("forward"), self.precision.forward():
            outputs = self.module(*self.precision.inputs(args), **self.precision.inputs(kwargs))
        if self.scaler is not None and torch.is_grad_enabled():
            outputs = scaled_outputs(outputs, self._output_scale)
        return outputs

    def backward(
        self,
        loss: Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        *,
        count: Tensor | float | None = None,
    ) -> Tensor:
        """Gradients of the loss, which add up until the update. Plain `loss.backward()` does the same.

        Args:
            loss: scalar; the mean of a micro-batch, of which a step takes the mean over micro-batches and ranks.
            scale_wrt_gas: False if the caller has divided by gradient_accumulation_steps already.
            count: loss is the mean over so many items (unmasked tokens): a step takes the mean over the items of all
                micro-batches and ranks. All of a step's losses come with one, or none does.

        Returns loss / gradient_accumulation_steps (the loss itself with `count` or scale_wrt_gas=False), detached.
        """
        self._needs_optimizer("backward()")
        self._refuse_pipeline("engine.backward()")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise ConfigError(f"engine.backward() takes a scalar loss, not one of {kind}. Take its mean or its sum.")
        meaning: Any = "count" if count is not None else "micro-batch" if scale_wrt_gas else "part"
        self.accumulation.add(loss, count, meaning)
        factor = self.loss_scale * (1.0 if count is None else count / self._unit_of(count))
        self.zero.sync = self.accumulation.reduces_now
        self._loss_is_scaled = True
        with self.timers("backward"):
            scaled = loss if isinstance(factor, float) and factor == 1.0 else loss.float() * factor
            scaled.backward(retain_graph=retain_graph)
            self.zero.end_backward()
        self._loss_is_scaled = False
        return loss.detach() / (self.accumulation.steps if meaning == "micro-batch" else 1)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for a plain `.backward()` of it: all of it is scaled then."""
        self._loss_is_scaled = True
        return loss if self.scaler is None else loss.float() * self.scaler.scale

    def _output_scale(self) -> float:
        return 1.0 if self._loss_is_scaled else self.loss_scale

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Count a micro-batch, and at the boundary of accumulation update the weights, clear the gradients and step the
        learning-rate scheduler (with `lr_kwargs`). Collective.

        A step that overflowed in fp16 changes no weight and lowers the loss scale; as in DeepSpeed it counts in
        `global_steps` and in `skipped_steps`, and the scheduler stays where it is.

        Raises RuntimeError inside no_sync(), NonFiniteError under the policy `raise`.
        """
        self._needs_optimizer("step()")
        self._refuse_pipeline("engine.step()")
        accumulation = self.accumulation
        if accumulation.held:
            raise RuntimeError("step() inside no_sync(): gradients are held back here. Call step() after the block.")
        self.zero.end_backward(ran=False)  # of a plain loss.backward()
        boundary = accumulation.at_boundary
        accumulation.micro_steps += 1
        accumulation.applied = False
        if not boundary:
            return
        self.frozen.warn_of_thawed(self.log)
        divisor, total, items = accumulation.divisor, accumulation.total, accumulation.items
        known = accumulation.meaning is not None
        accumulation.begin()  # whatever comes of the update
        result = self._update(
            total if known else None,
            lambda items: (
                Divisors(divisor, divisor)
                if divisor
                else Divisors(max(items, 1.0) / accumulation.unit, max(items, 1.0))
            ),
            items=items if divisor is None else None,
        )
        self._stepped(result, lr_kwargs)

    def _unit_of(self, count: Tensor | float) -> float:
        """The accumulation's unit; under loss scaling found from the first count of all. Collective then."""
        if self.scaler is not None and self.accumulation.unit == 1.0:
            most = all_reduce(torch.tensor(float(count), device=self.device), self.topology.group("world"), "max")
            self.accumulation.unit = 2.0 ** max(math.ceil(math.log2(max(float(most), 1.0))), 1)
        return self.accumulation.unit

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step so far. An update clears them by itself.

        Between the micro-batches of an accumulation nothing is forgotten: loops written for DeepSpeed call it there.
        """
        if self.shards is None or self.accumulation.micro_steps % self.accumulation.steps:
            return
        self.zero.discard()
        self.accumulation.begin()

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards within only add up gradients, without reducing them (stages 2 and 3 may still reduce; sums are
        equal). One backward outside and `step()` end the window."""
        return self.accumulation.hold()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether `step()` after the present micro-batch updates the weights."""
        return self.accumulation.at_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide that from now on, instead of counting micro-batches; None: count again."""
        self.accumulation.forced = is_boundary
        self.zero.sync = self.accumulation.reduces_now

    def was_step_applied(self) -> bool:
        """Whether the last `step()` changed the weights."""
        return self.accumulation.applied

    def _stepped(self, result: StepResult, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """After an update: counters, the scheduler, what is printed."""
        accumulation = self.accumulation
        self.last, accumulation.applied = result, not result.skipped
        accumulation.global_steps += 1
        accumulation.skipped_steps += int(result.skipped)
        if not result.skipped and self.lr_scheduler is not None:
            plateau = isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            if lr_kwargs or not plateau:  # a plateau needs the metric that its owner has
                self.lr_scheduler.step(**(lr_kwargs or {}))
        if result.warning and self.topology.rank == 0:
            self.log.warn(f"step {accumulation.global_steps} skipped: {result.warning}")
        scale = None if self.scaler is None else self.scaler.scale
        counters = (accumulation.global_steps, accumulation.skipped_steps)
        self.reporter.stepped(result, *counters, self.get_lr(), scale)
        if self.monitors is not None:
            values = {"train_loss": result.loss, "grad_norm": result.grad_norm, "loss_scale": scale}
            lr = dict(zip(("lr",), self.get_lr(), strict=False))
            self.monitors.write(accumulation.global_steps * self.train_batch_size(), values | lr)

    # a whole batch at a time

    def train_batch(self, data_iter: Iterable[Any] | None = None) -> Tensor:
        """One step: gradient_accumulation_steps micro-batches from `data_iter`, or from the training data given before.

        The module's forward returns a loss (see `loss_in`), or it is a PipelineModule and a micro-batch is (inputs,
        labels). Returns the mean loss over micro-batches and ranks, the same on all. Collective.
        """
        self._needs_optimizer("train_batch()")
        self.module.train()
        batches = self.feed.take(data_iter, "train_batch", self.accumulation.steps)
        if isinstance(self.module, PipelineModule) and self.topology.size("pp") > 1:
            self._train_pipeline(batches)
        else:
            for batch in batches:
                self.backward(self._loss(batch))
                self.step()
        assert self.last is not None
        return torch.tensor(self.last.loss, device=self.device)

    @torch.no_grad()
    def eval_batch(self, data_iter: Iterable[Any] | None = None, *, num_micro_batches: int | None = None) -> Tensor:
        """The mean loss of a batch over micro-batches and ranks, in eval mode, without gradients. Collective."""
        was_training = self.module.training
        self.module.eval()
        batches = self.feed.take(data_iter, "eval_batch", num_micro_batches or self.accumulation.steps)
        if isinstance(self.module, PipelineModule) and self.topology.size("pp") > 1:
            named = [self._micro_batch(batch) for batch in batches]
            losses = self._pipeline_for(named[0], shapes="any").forward(named)
        else:
            losses = [self._loss(batch) for batch in batches]
        self.module.train(was_training)
        total = torch.stack([torch.zeros((), device=self.device), *(loss.detach().float() for loss in losses)]).sum()
        mean = self._over_batch(total) / (len(batches) * self.topology.size("zero"))
        return mean if self.pipeline is None else self.pipeline.from_last(mean)

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Take the batches of `train_batch` from here from now on, pass after pass."""
        self.feed.set_loader(loader)

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """Take the batches of `train_batch` from this iterator from now on."""
        self.feed.iterator = iterator

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Have `train_batch` and `eval_batch` take `fn(batch)` of each micro-batch: (inputs, labels) of a mapping, say,
        for a PipelineModule."""
        self.feed.batch_fn = fn

    def _loss(self, batch: Any) -> Tensor:
        if isinstance(self.module, PipelineModule):
            self.zero.sync = self.accumulation.reduces_now
            with self.timers("forward"), self.precision.forward():
                return self.module.loss(self._micro_batch(batch))
        return loss_in(call(self, batch), self.module)

    def _micro_batch(self, batch: Any) -> dict[str, Tensor]:
        assert isinstance(self.module, PipelineModule)
        inputs, labels = named_micro_batch(batch, labelled=self.module.loss_fn is not None)
        return PipelineModule.micro_batch(self.precision.inputs(inputs), labels)

    def _pipeline_for(self, example: Mapping[str, Tensor], *, shapes: Literal["any", "its own"]) -> Pipeline:
        """The pipeline, made anew for micro-batches of other shapes where these matter."""
        if self.pipeline is None or (shapes != "any" and not self.pipeline.fits(example)):
            assert isinstance(self.module, PipelineModule)
            self.use_pipeline(
                partial(
                    self.module.pipeline,
                    micro_batches=self.accumulation.steps,
                    example=example,
                    device=self.device,
                    dtype=self.precision.dtype,
                )
            )
        assert self.pipeline is not None
        return self.pipeline

    def _train_pipeline(self, batches: list[Any]) -> None:
        named = [self._micro_batch(batch) for batch in batches]
        refuse_unlike(named)
        pipeline = self._pipeline_for(named[0], shapes="its own")
        count = float(self.accumulation.steps * self.accumulation.replicas)
        self.zero.sync = True
        with self.timers("forward and backward"), self.precision.forward():
            total = pipeline.train(named, torch.tensor(count / self.loss_scale, device=self.device))
            self.zero.end_backward()
        self.accumulation.micro_steps += len(batches)
        self._stepped(self._update(total, lambda _: Divisors(1.0, count)))

    def _refuse_pipeline(self, what: str) -> None:
        if isinstance(self.module, PipelineModule) and self.topology.size("pp") > 1:
            raise ConfigError(f"{what} with a pipeline of several stages: use engine.train_batch() and eval_batch().")

    def _needs_optimizer(self, what: str) -> None:
        if self.shards is None:
            raise ConfigError(
                f"{what} without an optimizer: initialize() got none, so that nothing is trained. Give it optimizer=…, "
                'or the configuration an "optimizer".'
            )
