"""Errors that a user can act on: each says the value, the rule and a remedy.

`assert` is kept for megazero's own invariants; everything a user can cause raises one of these.
"""

from __future__ import annotations


class MegazeroError(Exception):
    """Base of the errors that megazero raises on purpose."""


class ConfigError(MegazeroError, ValueError):
    """One or more settings are impossible. `problems` holds one complete sentence (value, rule, remedy) for each."""

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        if len(problems) == 1:
            text = problems[0]
        else:
            text = f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {p}" for p in problems)
        super().__init__(text)


class DataError(MegazeroError, ValueError):
    """A data file is missing, damaged, or does not fit the model or the run."""


class CheckpointError(MegazeroError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class NonFiniteError(MegazeroError, ArithmeticError):
    """A loss or gradient is NaN or infinite and the policy is `raise`; names the rank and the parameter."""


class OffloadError(MegazeroError, RuntimeError):
    """Offloaded state cannot be stored or read back: a full disk, a file cut short, a failed device."""
