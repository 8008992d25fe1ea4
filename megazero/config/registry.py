"""A list of rules about settings, and how a problem names a setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megazero.config.fields import flag_of, value_of
from megazero.config.schema import RunConfig

Rule = Callable[[RunConfig, int | None], Iterator[str]]
"""(resolved configuration, number of ranks or None when not known yet) -> one sentence for each problem."""


class Rules(list[tuple[tuple[str, ...], Rule]]):
    """Rules, each after the recipe keys of the numbers that it reads."""

    def rule(self, *keys: str) -> Callable[[Rule], Rule]:
        """Register a rule that reads these keys."""

        def register(rule: Rule) -> Rule:
            self.append((keys, rule))
            return rule

        return register


def show(config: RunConfig, key: str) -> str:
    """A setting as problems name it: `--lr 0.1`, followed by its file or other origin if it is not from a flag."""
    value = value_of(config, key)
    origin = config.origins.get(key, "")
    aside = "" if origin.startswith("flag") or not origin else f" ({origin})"
    if isinstance(value, bool):
        return f"{flag_of(key) if value else flag_of(key).replace('--', '--no-', 1)}{aside}"
    return f"{flag_of(key)} {' '.join(value) if isinstance(value, tuple) else value}{aside}"
