"""Learning-rate schedules: DeepSpeed's five with its formulas and defaults, any of torch's by name, our own course."""

from __future__ import annotations

from megazero.engine.schedulers.base import Schedule
from megazero.engine.schedulers.course import Course, course_of
from megazero.engine.schedulers.cycle import LRRangeTest, OneCycle
from megazero.engine.schedulers.make import make_scheduler
from megazero.engine.schedulers.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "Course",
    "LRRangeTest",
    "OneCycle",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "course_of",
    "make_scheduler",
]
