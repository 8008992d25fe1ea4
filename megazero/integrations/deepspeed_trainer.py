"""One train() after another with transformers' Trainer.

    train() ─► accelerate ends the engine of the last one ─► Trainer._wrap_model(that engine) ─► the Trainer's model

The Trainer takes the engine that it keeps for one at work, and prepares no other. An ended one is answered here with
the Trainer's own model, which is then prepared as the first time.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from megazero.engine.engine import Engine


def let_train_again() -> None:
    """Have the Trainer, once it is imported, go back to its model where its engine was ended. Once a process."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    wrap = getattr(trainer, "_wrap_model", None)
    if wrap is None or hasattr(wrap, "__wrapped__"):
        return

    @functools.wraps(wrap)
    def wrap_model(self: Any, model: Any, *args: Any, **given: Any) -> Any:
        ended = isinstance(model, Engine) and model.let_go_by is not None
        return wrap(self, self.model if ended else model, *args, **given)

    trainer._wrap_model = wrap_model  # type: ignore[union-attr]
