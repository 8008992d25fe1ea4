"""Messages of one process, told apart by rank: rank 0 writes bare lines, the others `[rank 3] …`.

A `Log` is a value passed down, not a global. What is said goes to stdout, warnings to stderr, both at once (flushed),
so that the lines of many ranks stay in order and survive a kill.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field


@dataclass
class Log:
    """Where this rank writes its messages."""

    rank: int = 0
    _warned: set[str] = field(default_factory=set, repr=False)

    def info(self, text: str) -> None:
        """Say it, on every rank that calls."""
        print(self._marked(text), flush=True)

    def main(self, text: str) -> None:
        """Say it on rank 0 alone: what every rank knows."""
        if self.rank == 0:
            self.info(text)

    def warn(self, text: str) -> None:
        """Warn, on every rank that calls, on stderr."""
        print(self._marked(f"warning: {text}"), file=sys.stderr, flush=True)

    def warn_once(self, text: str) -> None:
        """Warn, unless this very text was warned of before."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    def _marked(self, text: str) -> str:
        if self.rank == 0:
            return text
        return "\n".join(f"[rank {self.rank}] {line}" for line in text.split("\n"))
