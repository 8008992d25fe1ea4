"""Optimizers: classes that are ordinary torch optimizers, the same by name, and what ZeRO needs to know of any.

Element-wise ones step on flat cuts as they are; Lamb and Muon implement megazero/engine/sharded.py's protocol.
"""

from __future__ import annotations

from megazero.engine.optimizers.cuts import repoint, start_states
from megazero.engine.optimizers.eight_bit import adam_8bit
from megazero.engine.optimizers.element_wise import element_wise_problem, is_element_wise
from megazero.engine.optimizers.fused import SGD, Adagrad, Adam, AdamW, CPUAdam, FusedAdam
from megazero.engine.optimizers.lamb import Lamb
from megazero.engine.optimizers.lion import Lion
from megazero.engine.optimizers.make import make_optimizer
from megazero.engine.optimizers.muon import Muon

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "CPUAdam",
    "FusedAdam",
    "Lamb",
    "Lion",
    "Muon",
    "adam_8bit",
    "element_wise_problem",
    "is_element_wise",
    "make_optimizer",
    "repoint",
    "start_states",
]
