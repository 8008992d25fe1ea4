"""The machines of a launch: a hostfile's lines, and which of their devices --include and --exclude leave.

    worker-0 slots=8                  --include worker-0@worker-1:0,2    worker-0 whole, two devices of worker-1
    me@worker-1 slots=8   # comment   --exclude worker-1:3               everything but one device

A slot is a device's position among those that the machine shows (0 is the first of its CUDA_VISIBLE_DEVICES). The
format is DeepSpeed's and Open MPI's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megazero.base.errors import ConfigError
from megazero.config.decode import did_you_mean


@dataclass(frozen=True)
class Host:
    """A machine, and the devices on it that get one process each."""

    name: str
    slots: tuple[int, ...]
    user: str = ""
    """For ssh; empty: as ssh's own settings have it."""

    @property
    def login(self) -> str:
        """What ssh is given: `user@host`, or the host alone."""
        return f"{self.user}@{self.name}" if self.user else self.name


def parse_hostfile(text: str, file: str) -> list[Host]:
    """The machines in the order of their lines; `file` is its name, for errors.

    Raises ConfigError, naming the lines, for those that are not `host slots=N`, for a host named twice, and for a file
    without any.
    """
    problems: list[str] = []
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(?:(?P<user>[^\s@:=]+)@)?(?P<host>[^\s@:=]+)\s+slots\s*=\s*(?P<slots>\d+)", words)
        if match is None:
            problems.append(f"{file}, line {number}: {words!r} is not `host slots=N`. Write `worker-1 slots=8`, say.")
            continue
        name, slots = match["host"], int(match["slots"])
        if name in hosts:
            problems.append(
                f"{file}, line {number}: {name} stands on line {lines[name]} already. "
                "Give a host one line, with all of its slots."
            )
        elif slots == 0:
            problems.append(f"{file}, line {number}: slots=0 starts nothing on {name}. Remove the line.")
        else:
            hosts[name], lines[name] = Host(name, tuple(range(slots)), match["user"] or ""), number
    if not problems and not hosts:
        problems.append(f"{file} names no host. Write a line `host slots=N` for each.")
    if problems:
        raise ConfigError(*problems)
    return list(hosts.values())


def included(hosts: Sequence[Host], text: str) -> list[Host]:
    """Those that `--include text` names, in the hostfile's order.

    Raises ConfigError for hosts and slots that are not there, and for text of another form.
    """
    wanted = _parse(hosts, text, "--include")
    return [replace(host, slots=wanted[host.name] or host.slots) for host in hosts if host.name in wanted]


def excluded(hosts: Sequence[Host], text: str) -> list[Host]:
    """Those that `--exclude text` leaves, in the hostfile's order.

    Raises ConfigError as `included` does, and when nothing is left.
    """
    unwanted = _parse(hosts, text, "--exclude")
    left = []
    for host in hosts:
        gone = (unwanted[host.name] or host.slots) if host.name in unwanted else ()
        slots = tuple(slot for slot in host.slots if slot not in gone)
        if slots:
            left.append(replace(host, slots=slots))
    if not left:
        raise ConfigError(f"--exclude {text}: no slot of any host is left. Exclude fewer.")
    return left


def _parse(hosts: Sequence[Host], text: str, flag: str) -> dict[str, tuple[int, ...]]:
    """Host name -> slots; none for all of them."""
    known = {host.name: host for host in hosts}
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        match = re.fullmatch(r"([^\s@:]+)(?::(\d+(?:,\d+)*))?", part.strip())
        if match is None:
            raise ConfigError(f"{flag} {text}: {part!r} is not `host` or `host:0,1`. Join several with @: a:0,1@b:2.")
        name, numbers = match[1], match[2]
        if name not in known:
            raise ConfigError(
                f"{flag} {text}: no host {name}.{did_you_mean(name, known)} There are {', '.join(known)}."
            )
        if name in found:
            raise ConfigError(f"{flag} {text}: {name} stands there twice. Give its slots at once: {name}:0,1.")
        slots = tuple(sorted({int(number) for number in numbers.split(",")})) if numbers else ()
        missing = [slot for slot in slots if slot not in known[name].slots]
        if missing:
            raise ConfigError(
                f"{flag} {text}: {name} has no slot {missing[0]}; it has {len(known[name].slots)}, counted from 0."
            )
        found[name] = slots
    return found
