"""The door from settings to a run: fill in what is derived, and refuse what cannot work, all of it at once."""

from __future__ import annotations

from megazero.base.errors import ConfigError
from megazero.config.derive import derive
from megazero.config.layout import padded_vocab_size
from megazero.config.rules import find_problems
from megazero.config.schema import RunConfig

__all__ = ["padded_vocab_size", "resolve"]


def resolve(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with its derived values, checked. Resolving twice changes nothing.

    `lr_decay_iters` stays None (a checkpoint may know it), and so does `vocab_size` when a tokenizer will give it:
    call again once it is set. Raises ConfigError with one sentence for each problem: values, rule, remedy.
    """
    filled = derive(config, world_size)
    problems = find_problems(filled, world_size)
    if problems:
        raise ConfigError(*problems)
    return filled
