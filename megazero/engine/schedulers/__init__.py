"""Learning-rate schedules: DeepSpeed's five with its formulas and defaults, and any of torch's by name."""

from __future__ import annotations

from megazero.engine.schedulers.base import Schedule
from megazero.engine.schedulers.cycle import LRRangeTest, OneCycle
from megazero.engine.schedulers.make import make_scheduler
from megazero.engine.schedulers.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["LRRangeTest", "OneCycle", "Schedule", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR", "make_scheduler"]
