"""Records and configurations for the tests of metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megazero.config.schema import LoggingConfig, RunConfig, TrainingConfig
from megazero.train.records import StepRecord, ValidationRecord


def step(iteration: int, **changes: Any) -> StepRecord:
    """A training line of a run with batches of 32 samples of 64 tokens."""
    record: dict[str, Any] = {
        "iteration": iteration,
        "consumed_samples": 32 * iteration,
        "consumed_tokens": 32 * 64 * iteration,
        "lm_loss": 6.123456,
        "learning_rate": 1e-3,
        "grad_norm": 1.234,
        "loss_scale": 1.0,
        "iteration_time_ms": 123.4,
        "tokens_per_second": 16596.4,
        "tflops_per_device": 1.2,
        "mfu": 0.4,
        "memory_bytes": 10**9,
        "communication_bytes": {"tp": {"all-reduce": 2_097_152}, "zero": {"padding": 96, "reduce-scatter": 4096}},
        "communication_calls": {"tp": {"all-reduce": 8}, "zero": {"reduce-scatter": 2}},
        "skipped_iterations": 0,
    }
    assert changes.keys() <= record.keys()
    return StepRecord(**{**record, **changes})


def validation(iteration: int, loss: float = 6.5) -> ValidationRecord:
    return ValidationRecord(iteration=iteration, consumed_samples=32 * iteration, validation_loss=loss)


def config(folder: Path, **logging: Any) -> RunConfig:
    """A resolved configuration, as far as metrics read it."""
    return RunConfig(
        training=TrainingConfig(train_iters=100, global_batch_size=32),
        logging=LoggingConfig(output_dir=str(folder), **{"progress": "plain", **logging}),
    )
