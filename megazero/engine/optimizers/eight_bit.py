"""Adam and AdamW with 8-bit moments (Dettmers et al., arXiv 2110.02861), from bitsandbytes or torchao if installed.

Both quantise blocks of elements and keep small tensors (under 4096 elements) in fp32. Over ZeRO's cuts the blocks are
counted from the start of each cut, so the rounding differs from that of whole parameters, within the 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megazero.base.errors import ConfigError
from megazero.base.optional import MissingPackageError, available, require

BACKENDS = {"bitsandbytes": ("bitsandbytes.optim", "bitsandbytes"), "torchao": ("torchao.optim", "torchao")}
"""Package -> (module with the classes, pip name)."""


def adam_8bit(params: Any, *, decoupled: bool, backend: str | None = None, **arguments: Any) -> torch.optim.Optimizer:
    """AdamW (`decoupled`) or Adam (L2) with 8-bit moments.

    Args:
        backend: `bitsandbytes` or `torchao`; None is the first of the two that is installed.
        arguments: lr, betas, eps, weight_decay and what else the package's class takes.

    Raises MissingPackageError with the pip line, ConfigError for an unknown backend.
    """
    name = "AdamW8bit" if decoupled else "Adam8bit"
    if backend is None:
        installed = [package for package in BACKENDS if available(package)]
        if not installed:
            raise MissingPackageError(
                f"neither bitsandbytes nor torchao is installed; one is needed for {name}. Install it: "
                f"pip install bitsandbytes, or take {'AdamW' if decoupled else 'Adam'}"
            )
        backend = installed[0]
    if backend not in BACKENDS:
        raise ConfigError(f"{name} with backend {backend!r}: give one of {', '.join(BACKENDS)}, or leave it out.")
    module, pip = BACKENDS[backend]
    made = getattr(require(module, pip, f"for {name}"), name)(params, **_as_tuples(arguments))
    assert isinstance(made, torch.optim.Optimizer)
    return made


def _as_tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
