"""`megazero launch`: a thin layer over torchrun.

words ─► Arguments ─► which machines and devices ─► one torchrun here, or an ssh for each machine ─► wait together

A launch on this machine becomes torchrun itself (exec): signals and the exit status are torchrun's.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from megazero.base.errors import ConfigError
from megazero.base.launch import environment
from megazero.launch.arguments import Arguments, parse
from megazero.launch.commands import DEVICES, Command, is_secret, over_ssh, parse_variables, sent, torchrun
from megazero.launch.hostfile import Host, excluded, included, parse_hostfile
from megazero.launch.processes import Processes, when_stdin_closes

VARIABLES_FILE = ".megazero_env"
"""In the working directory: NAME=value lines that every machine of a launch over ssh gets. Secrets are read by each
machine from its own copy."""


def launch(words: Sequence[str]) -> int:
    """Do what the words after `megazero launch` say; the exit status, unless this process becomes torchrun.

    Raises ConfigError for words, files and hosts that make no launch.
    """
    arguments = parse(words)
    environ = environment()
    hosts = _hosts(arguments) if arguments.hostfile else None
    if hosts is None or arguments.no_ssh or (len(hosts) == 1 and _is_here(hosts[0].name)):
        return _here(arguments, hosts, environ)
    exported = _variables()
    variables, secrets = sent(environ, exported)
    commands = over_ssh(arguments, hosts, variables, os.getcwd())
    if secrets:
        print(_withheld(secrets, exported), file=sys.stderr, flush=True)
    if arguments.dry_run:
        print("\n".join(map(str, commands)))
        return 0
    if shutil.which("ssh") is None:
        raise ConfigError(
            f"no ssh on this machine's PATH, and {len(hosts)} machines to start. Install an ssh client, or run the "
            "launch on every machine with --no_ssh --node_rank R."
        )
    return Processes(commands, [host.name for host in hosts], hold_stdin=True).wait()


def _withheld(secrets: Sequence[str], exported: Mapping[str, str]) -> str:
    """Which secrets are not sent, and how they get there."""
    missing = [name for name in secrets if name not in exported]
    words = f"megazero launch: {', '.join(secrets)} not sent: command lines are seen by others. "
    if not missing:
        return f"{words}Each machine reads its own {VARIABLES_FILE} in the working directory."
    return (
        f"{words}If the other machines need {'it' if len(missing) == 1 else 'them'}, write {missing[0]}=… into "
        f"{VARIABLES_FILE} in the working directory of each, readable by you alone, or log in there."
    )


def _hosts(arguments: Arguments) -> list[Host]:
    """The machines, with the slots to use on each."""
    assert arguments.hostfile is not None
    path = Path(arguments.hostfile).expanduser()
    if not path.is_file():
        raise ConfigError(f"--hostfile {path}: no such file. Write one with a line `host slots=N` for each machine.")
    hosts = parse_hostfile(path.read_text(), str(path))
    if arguments.include:
        hosts = included(hosts, arguments.include)
    if arguments.exclude:
        hosts = excluded(hosts, arguments.exclude)
    if arguments.num_nodes and arguments.num_nodes > len(hosts):
        raise ConfigError(f"--num_nodes {arguments.num_nodes}: {path} names {len(hosts)}. Add lines, or ask for fewer.")
    hosts = hosts[: arguments.num_nodes]
    for host in hosts:
        if arguments.num_gpus and arguments.num_gpus > len(host.slots):
            raise ConfigError(
                f"--num_gpus {arguments.num_gpus}: {path} gives {host.name} {len(host.slots)} slots. Raise slots=, or "
                "ask for fewer."
            )
    return [replace(host, slots=host.slots[: arguments.num_gpus]) for host in hosts]


def _is_here(name: str) -> bool:
    return name in ("localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().partition(".")[0])


def _here(arguments: Arguments, hosts: Sequence[Host] | None, environ: Mapping[str, str]) -> int:
    """This machine's part."""
    if not (arguments.module or arguments.no_python or Path(arguments.script).exists()):
        raise ConfigError(f"{arguments.script}: no such script in {os.getcwd()}. Check its path; -m runs a module.")
    rank, nodes = arguments.node_rank or 0, len(hosts) if hosts else arguments.num_nodes or 1
    if hosts and rank >= nodes:
        raise ConfigError(f"--node_rank {rank} of {nodes} machines in {arguments.hostfile}: they count from 0.")
    if hosts and nodes > 1 and not arguments.master_addr:
        arguments = replace(arguments, master_addr=hosts[0].name)
    slots = hosts[rank].slots if hosts else _local_slots(arguments, environ)
    processes = len(slots) if slots else arguments.num_gpus or _device_count(environ)
    command = torchrun(arguments, processes, nodes, slots, environ)
    if arguments.dry_run:
        print(command)
        return 0
    if arguments.until_stdin_closes:
        secrets = {name: value for name, value in _variables().items() if is_secret(name)}
        command = replace(command, environment={**secrets, **command.environment})
        processes_here = Processes([command], [f"machine {rank}"], hold_stdin=False)
        when_stdin_closes(processes_here.ask_to_end)
        return processes_here.wait()
    return _become(command, environ)


def _become(command: Command, environ: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    os.execvpe(command.words[0], command.words, {**environ, **command.environment})


def _local_slots(arguments: Arguments, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Slots of this machine without a hostfile; None: the first ones."""
    if not arguments.include and not arguments.exclude:
        return None
    if arguments.exclude:
        return excluded([Host("localhost", tuple(range(_device_count(environ))))], arguments.exclude)[0].slots
    assert arguments.include is not None
    # any slots may be named: on a CPU nothing limits them, and torchrun() holds them to CUDA_VISIBLE_DEVICES
    named = [int(number) for number in re.findall(r"\d+", arguments.include.partition(":")[2])]
    count = max(named) + 1 if named else _device_count(environ)
    return included([Host("localhost", tuple(range(count)))], arguments.include)[0].slots


def _device_count(environ: Mapping[str, str]) -> int:
    """Devices that this machine shows, at least 1 (the CPU)."""
    visible = environ.get(DEVICES)
    if visible is not None:
        return len(visible.split(",")) if visible else 1
    import torch  # slow to import, and needed only when nothing says how many

    return max(torch.cuda.device_count(), 1)


def _variables() -> dict[str, str]:
    path = Path(VARIABLES_FILE)
    return parse_variables(path.read_text(), str(path)) if path.is_file() else {}
