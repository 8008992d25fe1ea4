""" "auto" and what a ds_config leaves out, settled without Hugging Face.

    reduce_bucket_size h²     stage3_prefetch_bucket_size 0.9 h²     stage3_param_persistence_threshold 10 h
    fp16.enabled, bf16.enabled: bf16 on a GPU (fp16 where bf16 is false), fp32 on a CPU
    batch: one sample a rank, no accumulation

(transformers/integrations/deepspeed.py for the sizes; elements.) What is left out has DeepSpeed's default: stage 0,
fp32, gradient_clipping 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megazero.base.errors import ConfigError
from megazero.config.batch import Batch, BatchNames, complete_batch
from megazero.config.deepspeed_optimizers import Named, settle_optimizer, settle_scheduler
from megazero.config.deepspeed_spelling import written
from megazero.config.derive import derive_engine
from megazero.config.facts import ModelFacts
from megazero.config.fields import FIELDS
from megazero.config.layers import Layer, Setting, assemble
from megazero.config.rules import engine_problems
from megazero.config.schema import RunConfig

NAMES = BatchNames("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
BATCH_KEYS = ("training.global_batch_size", "training.micro_batch_size", "training.gradient_accumulation_steps")
_CLIPPING, _CLIPPING_KEY = "optimizer.clip_grad", "gradient_clipping"
_PRECISION = "training.precision"
_SIZES = {
    "parallel.ddp_bucket_size": ("h²", lambda h: h * h),
    "parallel.stage3_prefetch_bucket_size": ("0.9 h²", lambda h: int(0.9 * h * h)),
    "parallel.stage3_param_persistence_threshold": ("10 h", lambda h: 10 * h),
}


@dataclass
class Settled:
    """Settings with nothing open, on the way to a ResolvedDeepSpeed."""

    config: RunConfig
    lines: list[tuple[str, str]] = field(default_factory=list)
    """Key and text of each "auto"."""
    assumed: list[tuple[str, str]] = field(default_factory=list)
    """Key and value of what the file leaves out."""
    ignored: list[tuple[str, str]] = field(default_factory=list)
    """Key that has no effect with the others, and why."""
    problems: list[str] = field(default_factory=list)

    def named(
        self, optimizer: Named | None, scheduler: Named | None, total_steps: int | None
    ) -> tuple[Named | None, Named | None, list[tuple[str, str]], list[str]]:
        """Optimizer and scheduler without "auto", lines of the report, problems."""
        lines: list[tuple[str, str]] = []
        problems: list[str] = []
        if optimizer is not None:
            optimizer, more = settle_optimizer(optimizer, scheduler)
            lines += more
        if scheduler is not None:
            lr = optimizer.params.get("lr") if optimizer is not None else None
            scheduler, more, problems = settle_scheduler(scheduler, lr, total_steps)
            lines += more
        return optimizer, scheduler, lines, problems


def settle(
    label: str,
    settings: Layer,
    autos: dict[str, tuple[str, ...]],
    ranks: int,
    model: ModelFacts | None,
    on_gpu: str = "bf16",
) -> Settled:
    """Fill in every setting that is open; `ranks` divide the batch, and a precision "auto" is `on_gpu` on a GPU.
    Problems are returned, not raised."""
    found: dict[str, Setting] = dict(settings)
    lines: list[tuple[str, str]] = []
    assumed: list[tuple[str, str]] = []
    problems: list[str] = []

    def fill(key: str, path: str, value: Any, text: str) -> None:
        found.setdefault(key, Setting(value, f"{label} {path}: {text}"))
        (lines if path in autos else assumed).append((path, text))

    for path, keys in autos.items():
        for key in keys:
            if key in _SIZES:
                _size(key, path, model, fill, lines)
            elif key == _PRECISION:
                fill(key, path, "auto", f"auto: {on_gpu} on a GPU, fp32 on a CPU")
            elif key not in BATCH_KEYS and key != _CLIPPING:
                default = FIELDS[key].default
                fill(key, path, default, f"auto: {default}" if default is not None else "auto: derived")
    for key, path, value, text in (
        ("parallel.zero_stage", "zero_optimization.stage", 0, "0"),
        (_PRECISION, "fp16 and bf16", "fp32", "off"),
        (_CLIPPING, "gradient_clipping", 1.0, "auto: 1.0" if _CLIPPING_KEY in autos else "1.0"),
    ):
        if key not in found:
            fill(key, path, value, text)
    batch, text = _batch(label, settings, ranks)
    if isinstance(batch, str):
        problems.append(batch)
    else:
        for name, key, number in zip(NAMES, BATCH_KEYS, batch, strict=True):
            if key not in found:
                fill(key, name, number, f"auto: {text}" if name in autos else f"{number}")
    ignored = drop_idle_offload(found, found["parallel.zero_stage"].value)
    config = derive_engine(assemble([found]))
    return Settled(config, lines, assumed, ignored, [*problems, *engine_problems(config)])


def drop_idle_offload(settings: dict[str, Setting], stage: int) -> list[tuple[str, str]]:
    """Take offloaded weights out of a ds_config's settings below stage 3; the key, and why it has no effect."""
    setting = settings.get("offload.offload_param", Setting("none", ""))
    place = written(setting.origin)
    if stage == 3 or setting.value == "none" or place is None:
        return []
    settings["offload.offload_param"] = setting._replace(value="none")
    return [(place[1], f"no effect at stage {stage}: only stage 3 has weights that can be away between uses")]


def _size(key: str, path: str, model: ModelFacts | None, fill: Any, lines: list[tuple[str, str]]) -> None:
    formula, size = _SIZES[key]
    if model is None:
        lines.append((path, "auto: derived from the model, once it is there"))
        return
    width, how = model.width
    fill(key, path, size(width), f"auto: {size(width):,} elements, {formula} with h = {width}, the {how}")


def _batch(label: str, settings: Layer, ranks: int) -> tuple[Batch | str, str]:
    """The whole batch, or the problem; and how it was completed."""
    step, micro, accumulation = (settings[key].value if key in settings else None for key in BATCH_KEYS)
    try:
        batch = complete_batch(step, micro, accumulation, ranks, NAMES)
    except ConfigError as error:
        return f"{label}: {error}", ""
    return batch, f"batch {batch.step} = micro-batch {batch.micro} · accumulation {batch.accumulation} · {ranks} ranks"
