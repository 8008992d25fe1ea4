"""What transformers' Trainer cannot do with an engine as its classes are, mended in them when the alias is used.

train() ─► accelerate ends the engine of the last one ─► Trainer._wrap_model(that engine) ─► the Trainer's model
save_model() ─► peft, on the first rank alone ─► the keys of modules_to_save from the given state dict
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from megazero.engine.engine import Engine


def mend_trainer() -> None:
    """Have the Trainer train and save; see the module. Only classes that are imported; a second call does nothing."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    wrap = getattr(trainer, "_wrap_model", None)
    if wrap is not None and not hasattr(wrap, "__wrapped__"):
        trainer._wrap_model = _of_its_model(wrap)  # type: ignore[union-attr]
    wrapper = getattr(sys.modules.get("peft.utils.other"), "ModulesToSaveWrapper", None)
    if hasattr(wrapper, "adapter_state_dict"):
        wrapper.adapter_state_dict = _adapter_state_dict  # type: ignore[union-attr]


def _of_its_model(wrap: Any) -> Any:
    """The Trainer takes the engine that it keeps for one at work and prepares no other; instead of an ended one it
    gets its own model, which is then prepared as the first time."""

    @functools.wraps(wrap)
    def wrap_model(self: Any, model: Any, *args: Any, **given: Any) -> Any:
        ended = isinstance(model, Engine) and model.let_go_by is not None
        return wrap(self, self.model if ended else model, *args, **given)

    return wrap_model


def _adapter_state_dict(self: Any, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """An adapter's entries of the wrapper's state dict. peft's own method asks the module for its state_dict() to know
    the keys, which at stage 3 waits for the other ranks for ever."""
    prefix = f"modules_to_save.{adapter_name}."
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
