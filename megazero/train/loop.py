"""The training loop: it knows WHEN (step, validate, save, stop); the engine knows HOW.

resume? ─► validate ─► [ step ─► log? ─► validate? ─► save? ─► stop? ]* ─► validate ─► save ─► sample, plot, summary
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from megazero.base.device import measure_gemm_flops, memory_bytes, peak_flops
from megazero.base.errors import ConfigError, DataError
from megazero.config.recipe import to_yaml
from megazero.config.schema import RunConfig
from megazero.data.batch import Batch
from megazero.data.loader import GlobalBatches
from megazero.data.sample import SampleSource
from megazero.engine.engine import DTYPES, StepResult
from megazero.engine.lr import LearningRate
from megazero.parallel.collectives import gather_objects
from megazero.parallel.context import local_places
from megazero.parallel.traffic import by_axis
from megazero.plan.flops import flops_per_token
from megazero.train.entry import explain_lost_ranks
from megazero.train.metrics import Metrics
from megazero.train.report import finish_report
from megazero.train.resume import Progress, resume_or_start, save
from megazero.train.setup import Run, set_up


def pretrain(config: RunConfig) -> None:
    """Train as the configuration says, from a new model or from where a checkpoint left off. Collective."""
    with set_up(config) as run, _stop_signals() as stop:
        progress, rate = resume_or_start(run)
        with _open_outputs(run, progress.iteration) as metrics:
            try:
                Loop(run, progress, rate, metrics, stop).train()
            except RuntimeError as error:
                explain_lost_ranks(error, progress.iteration, run.topology)
                raise


def _open_outputs(run: Run, resumed_at: int) -> Metrics:
    """The run's metrics and its config.yaml, by rank 0. If it cannot, every rank raises its error. Collective."""
    metrics, problem = None, None
    try:
        metrics = Metrics(run.config, is_main=run.launch.rank == 0, resumed_at=resumed_at)
        if run.launch.rank == 0:
            write_config(run.config)
    except (ConfigError, DataError) as error:
        problem = error
    problem = gather_objects(problem, run.topology.group("world"))[0]
    if problem is not None:
        raise problem
    assert metrics is not None
    return metrics


def write_config(config: RunConfig) -> None:
    """Leave the resolved settings, each with its origin, in the run's folder. Raises ConfigError if it can't."""
    assert config.logging.output_dir is not None
    target = Path(config.logging.output_dir, "config.yaml")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name("config.yaml.new")
        fresh.write_text(to_yaml(config), encoding="utf-8")
        fresh.replace(target)
    except OSError as error:
        raise ConfigError(
            f"--output-dir {config.logging.output_dir} cannot be written ({error.strerror}). Give a folder that can."
        ) from error


@dataclass
class Stop:
    """A wish to stop after the present step."""

    reason: str | None = None


@dataclass
class _Interval:
    """What has happened since the last metrics line."""

    losses: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)


class Loop:
    """One run's loop. `train` is the whole of it."""

    def __init__(self, run: Run, progress: Progress, rate: LearningRate, metrics: Metrics, stop: Stop) -> None:
        training = run.config.training
        assert training.train_iters is not None and training.global_batch_size is not None
        self.run, self.progress, self.rate, self.metrics, self.stop = run, progress, rate, metrics, stop
        self.train_iters, self.batch = training.train_iters, training.global_batch_size
        self.tokens_per_step = self.batch * run.config.data.seq_length
        self.flops_per_step = flops_per_token(run.config.model, run.config.data.seq_length) * self.tokens_per_step
        self.peak = self._peak_flops()
        self.started = time.monotonic()

    def train(self) -> None:
        run, progress = self.run, self.progress
        if progress.iteration >= self.train_iters:
            run.log.main(already_complete(run.config, progress.iteration))
            return
        config = run.config
        if progress.iteration == 0:
            self._validate()
        assert run.datasets.train is not None
        batches = self._batches(run.datasets.train, progress.consumed_samples)
        interval = _Interval()
        last = False
        while not last:
            result = self._step(next(batches))
            interval.losses.append(result.loss)
            iteration = progress.iteration
            last = self._must_stop(result) or iteration == self.train_iters
            if iteration % config.logging.log_interval == 0 or last:
                self._log(result, interval)
                interval = _Interval()
            paused = time.perf_counter()
            if _due(iteration, config.training.eval_interval) or iteration == self.train_iters:
                self._validate()
            if _due(iteration, config.checkpoint.save_interval) or last:
                save(run, progress, self.rate)
            interval.began += time.perf_counter() - paused  # the time of a step is that of steps alone
        batches.close()
        if progress.iteration == self.train_iters:
            finish_report(run, self.metrics)
        else:
            self.metrics.message(
                f"stopped after iteration {progress.iteration} of {self.train_iters} ({self.stop.reason}); checkpoint "
                f"saved in {config.checkpoint.save}. The same command goes on from there."
            )

    def _step(self, batches: list[Batch]) -> StepResult:
        run, progress = self.run, self.progress
        updates = progress.iteration - progress.skipped
        self.learning_rate = self.rate.at(updates)
        count = float(sum(batch.loss_mask.sum().item() for batch in batches))
        limit = run.config.training.exit_duration_in_mins
        if limit is not None and time.monotonic() - self.started >= limit * 60:
            self.stop.reason = self.stop.reason or f"--exit-duration-in-mins {limit:g}"
        before = run.topology.traffic.totals()
        run.forward.step = progress.iteration
        result = run.engine.train_step(
            self._on_device(batches),
            run.forward.loss_sum,
            count,
            lr=self.learning_rate,
            notice=1.0 if self.stop.reason else 0.0,
        )
        self.traffic = run.topology.traffic.since(before)
        progress.iteration += 1
        progress.consumed_samples += self.batch
        progress.consumed_tokens += self.tokens_per_step
        progress.skipped += int(result.skipped)
        if result.warning:
            self.metrics.message(f"iteration {progress.iteration} skipped: {result.warning}")
        return result

    def _must_stop(self, result: StepResult) -> bool:
        """Whether to stop here; the same answer on every rank, whichever of them was asked to."""
        if result.notice > 0:
            self.stop.reason = self.stop.reason or "another rank was asked to stop"
            return True
        if _due(self.progress.iteration, self.run.config.training.exit_interval):
            self.stop.reason = f"--exit-interval {self.run.config.training.exit_interval}"
            return True
        return False

    def _on_device(self, batches: list[Batch]) -> list[Batch]:
        return [batch.to(self.run.device, non_blocking=True) for batch in batches]

    def _batches(self, dataset: SampleSource, consumed: int) -> GlobalBatches:
        dp, cp, training = self.run.topology.group("dp"), self.run.topology.group("cp"), self.run.config.training
        return GlobalBatches(
            dataset,
            micro_batch_size=training.micro_batch_size,
            global_batch_size=self.batch,
            dp_rank=dp.rank,
            dp_size=dp.size,
            consumed_samples=consumed,
            part=local_places(self.run.config.data.seq_length, cp) if cp.size > 1 else None,
            pin_memory=self.run.device.type == "cuda",
        )

    def _validate(self) -> None:
        """Mean loss per token over the same validation samples each time."""
        valid = self.run.datasets.valid
        if valid is None:
            return
        total = tokens = 0.0
        for batches in self._batches(valid, 0):
            count = float(sum(batch.loss_mask.sum().item() for batch in batches))
            part, part_tokens = self.run.engine.evaluate(self._on_device(batches), self.run.forward.loss_sum, count)
            total, tokens = total + part, tokens + part_tokens
        self.metrics.validation(
            {
                "iteration": self.progress.iteration,
                "consumed_samples": self.progress.consumed_samples,
                "validation_loss": total / max(tokens, 1.0),
            }
        )

    def _log(self, result: StepResult, interval: _Interval) -> None:
        progress, steps = self.progress, len(interval.losses)
        finite = [loss for loss in interval.losses if math.isfinite(loss)]
        seconds = (time.perf_counter() - interval.began) / steps
        per_device = self.flops_per_step / seconds / self.run.topology.world_size
        sent, calls = by_axis(self.traffic)
        self.metrics.step(
            {
                "iteration": progress.iteration,
                "consumed_samples": progress.consumed_samples,
                "consumed_tokens": progress.consumed_tokens,
                "lm_loss": sum(finite) / len(finite) if finite else math.nan,
                "learning_rate": self.learning_rate,
                "grad_norm": result.grad_norm,
                "loss_scale": self.run.engine.loss_scale,
                "iteration_time_ms": seconds * 1e3,
                "tokens_per_second": self.tokens_per_step / seconds,
                "tflops_per_device": per_device / 1e12,
                "mfu": per_device / self.peak,
                "memory_bytes": memory_bytes(self.run.device),
                "communication_bytes": sent,
                "communication_calls": calls,
                "skipped_iterations": progress.skipped,
            },
            nan_iterations=steps - len(finite),
        )

    def _peak_flops(self) -> float:
        """This rank's FLOP/s at best: the vendor's figure, else a measured matrix multiply."""
        dtype = DTYPES[self.run.config.training.precision]
        known = peak_flops(self.run.device, dtype)
        return known or measure_gemm_flops(self.run.device, dtype, torch.get_num_threads())


def already_complete(config: RunConfig, iteration: int) -> str:
    """What to say, and how to go on, when there is nothing left to train."""
    folder = Path(config.logging.output_dir or ".")
    return (
        f"{folder} is complete: its checkpoint is at iteration {iteration} and --train-iters is "
        f"{config.training.train_iters}.\nTo train longer: the same command with a higher --train-iters resumes there. "
        "To start afresh: another --output-dir."
    )


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


@contextmanager
def _stop_signals() -> Iterator[Stop]:
    """SIGTERM and SIGINT ask for a clean stop after the present step; a SIGINT some seconds later stops at once.

    Not a second one right away: Ctrl-C under a launcher reaches a rank twice, from the terminal and from the launcher.
    """
    stop, asked = Stop(), 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if stop.reason is None:
            stop.reason, asked = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - asked > 5.0:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
