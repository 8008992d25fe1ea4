"""Parameters that were frozen when the engine was made, and are not any more.

requires_grad False at initialize()   no bucket, no master, no optimizer state
requires_grad True later              autograd makes gradients, and nothing steps on them: said once
"""

from __future__ import annotations

from torch import nn

from megazero.base.log import Log

_SHOWN = 4  # names in the warning


class Frozen:
    """The parameters of `module` that need no gradient now."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if not p.requires_grad}

    def warn_of_thawed(self, log: Log) -> None:
        """Say on rank 0 which need a gradient by now, each once."""
        thawed = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        for name in thawed:
            del self._parameters[name]
        if not thawed or log.rank:
            return
        shown = ", ".join(thawed[:_SHOWN]) + (f" and {len(thawed) - _SHOWN} more" if len(thawed) > _SHOWN else "")
        log.warn(
            f"{shown} needed no gradient when initialize() was called, and need one now: they are not trained. "
            "Call initialize() again after requires_grad_(True), or let them need a gradient at initialize() and "
            "freeze them afterwards."
        )
