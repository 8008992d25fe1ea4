"""The `megazero` command: `megazero launch | plan | report`. Each is imported only when it is called.

python -m megazero.cli does the same. Exit status: the command's own; 2 for settings that cannot work.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from megazero.base.errors import MegazeroError
from megazero.config.decode import did_you_mean

COMMANDS = {
    "launch": ("megazero.launch.launcher", "launch", "start a script on several devices and machines"),
    "plan": (
        "megazero.plan.planner",
        "plan",
        "bytes per rank of every ZeRO stage and offload, and the fastest that fits",
    ),
    "report": ("megazero.launch.report", "report", "versions, devices, backends, and what is missing"),
}
"""Command -> module, function of the words that follow (returns the exit status), what it does."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that `words` (default: the process's own) name; the exit status."""
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        hint = did_you_mean(words[0], COMMANDS)
        print(f"megazero: no command {words[0]!r}.{hint} There are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[words[0]]
    try:
        status = getattr(importlib.import_module(module), function)(words[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `megazero plan … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush at exit
        return 128 + signal.SIGPIPE
    except MegazeroError as error:
        print(f"megazero {words[0]}: {error}", file=sys.stderr)
        return 2
    return int(status)


def _help() -> str:
    lines = [f"  megazero {name:<8} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(["usage: megazero COMMAND ... (megazero COMMAND --help says more)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
