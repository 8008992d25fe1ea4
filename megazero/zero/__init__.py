"""ZeRO: what a user of DeepSpeed imports from `deepspeed.zero` and `deepspeed.utils`. Loaded when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Init": "context",
    "GatheredParameters": "context",
    "register_external_parameter": "context",
    "ZeroParamStatus": "status",
    "safe_get_full_fp32_param": "access",
    "safe_get_full_grad": "access",
    "safe_get_full_optimizer_state": "access",
    "safe_set_full_fp32_param": "access",
    "safe_set_full_grad": "access",
    "safe_set_full_optimizer_state": "access",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
