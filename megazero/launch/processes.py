"""Processes that live and die together: one ends badly, or Ctrl-C comes, and the others are ended too.

start ─► watch ─► first failure, or a signal ─► ask all to end ─► patience ─► SIGKILL ─► the first failure's status
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from megazero.base.launch import environment
from megazero.launch.commands import Command

PATIENCE_SECONDS = 40.0
"""For ending by itself after SIGTERM: torchrun gives its ranks 30, to save a checkpoint."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Processes:
    """The children of a launch.

    Args:
        names: what to call each in messages. patience: seconds between SIGTERM and SIGKILL.
        hold_stdin: the children watch their standard input: it stays open until they are to end, and closing it is the
            way to ask them (for machines behind ssh); without, they get SIGTERM.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        names: Sequence[str],
        *,
        hold_stdin: bool,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.names, self.patience = names, patience
        self._asked: int | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                self._children.append(
                    subprocess.Popen(
                        command.words,
                        env=environment() | dict(command.environment),
                        stdin=subprocess.PIPE if hold_stdin else subprocess.DEVNULL,
                        start_new_session=True,  # Ctrl-C comes here alone, and is passed on once
                    )
                )
        except OSError:
            self.end()
            raise

    def wait(self) -> int:
        """The exit status: 0 when all ended well, that of the first failure, or 128 + the signal that ended the launch.

        Signals that ask this process to end are passed on. Main thread only.
        """
        asking = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._ask) for number in asking}
        try:
            failed = self._watch()
            self.end()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._asked is not None:
            return 128 + self._asked
        return failed

    def ask_to_end(self) -> None:
        """End as if SIGHUP had come; any thread."""
        self._asked = self._asked or signal.SIGHUP

    def end(self) -> None:
        """End those that still run, and wait for them."""
        for child in self._children:
            if child.stdin:
                child.stdin.close()
            elif child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + self.patience
        while any(child.poll() is None for child in self._children) and time.monotonic() < deadline:
            time.sleep(0.05)
        for child in self._children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # its session: what it has started too
            child.wait()

    def _watch(self) -> int:
        """Wait for the first failure (its status), for all to end well, or for a signal (0)."""
        while self._asked is None:
            statuses = [child.poll() for child in self._children]
            for name, status in zip(self.names, statuses, strict=True):
                if status:
                    how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
                    others = "; the others are being ended" if None in statuses else ""
                    print(f"megazero launch: {name} {how}{others}", file=sys.stderr, flush=True)
                    return 128 - status if status < 0 else status
            if None not in statuses:
                return 0
            time.sleep(0.05)
        return 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or number


def when_stdin_closes(act: Callable[[], None]) -> None:
    """Call `act()` from a thread of its own once this process's standard input is at its end."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        act()

    threading.Thread(target=watch, daemon=True).start()
