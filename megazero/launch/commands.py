"""The commands of a launch: torchrun on this machine, and an ssh for each of several.

    one machine    python -m torch.distributed.run --standalone --nproc-per-node N script …
    several        ssh host 'cd here && exec env … python -m megazero.cli launch --no_ssh --node_rank R … script …'

CUDA_VISIBLE_DEVICES is never dropped: slots are positions in it, and it goes along to other machines.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megazero.base.errors import ConfigError
from megazero.base.launch import cpu_threads_for
from megazero.launch.arguments import Arguments
from megazero.launch.hostfile import Host

DEVICES = "CUDA_VISIBLE_DEVICES"
DEFAULT_PORT = 29500
EXPORTED = ("NCCL_", "GLOO_", "UCX_", "HF_", "TORCH_", "OMP_NUM_THREADS", "PYTHONPATH", DEVICES)
"""Beginnings of the names of variables that other machines get."""
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY)S?(_|$)", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a variable's name (HF_TOKEN, WANDB_API_KEY) says that its value is nobody's business: a command line is
    seen by all users of both machines, and stands in logs."""
    return _SECRET.search(name) is not None


def sent(environ: Mapping[str, str], exported: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What goes along to other machines on their command lines, and the names of the secrets that do not.

    Args:
        environ: this process's variables. exported: those of the user's file, for every machine.
    """
    meant = {name: value for name, value in environ.items() if name.startswith(EXPORTED)} | dict(exported)
    return {name: meant[name] for name in meant if not is_secret(name)}, sorted(filter(is_secret, meant))


@dataclass(frozen=True)
class Command:
    """Words to start, and what they get in the environment besides this process's own."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        return " ".join(
            [*(f"{key}={shlex.quote(value)}" for key, value in self.environment.items()), shlex.join(self.words)]
        )


def torchrun(
    arguments: Arguments, processes: int, nodes: int, slots: Sequence[int] | None, environ: Mapping[str, str]
) -> Command:
    """What starts this machine's `processes` ranks.

    Args:
        slots: positions of the devices to use, None for the first ones.

    Raises ConfigError when CUDA_VISIBLE_DEVICES shows fewer devices than are asked for.
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes == 1 and arguments.master_port is None:
        words.append("--standalone")
    else:
        address, port = arguments.master_addr or "127.0.0.1", arguments.master_port or DEFAULT_PORT
        words += ["--nnodes", str(nodes), "--node-rank", str(arguments.node_rank or 0)]
        words += ["--master-addr", address, "--master-port", str(port)]
    words += ["--module"] * arguments.module + ["--no-python"] * arguments.no_python
    extra = {}
    shown = _devices(environ.get(DEVICES), processes, slots)
    if shown is not None:
        extra[DEVICES] = shown
    if not environ.get("OMP_NUM_THREADS"):
        extra["OMP_NUM_THREADS"] = str(cpu_threads_for(processes, environ))
    return Command((*words, arguments.script, *arguments.words), extra)


def _devices(visible: str | None, processes: int, slots: Sequence[int] | None) -> str | None:
    """The new CUDA_VISIBLE_DEVICES, None to leave it as it is."""
    if visible == "":  # the user hides all GPUs: processes run on the CPU
        return None
    names = visible.split(",") if visible is not None else None
    needed = max(slots) + 1 if slots else processes
    if names is not None and needed > len(names):
        what = f"slot {max(slots)}" if slots else f"--num_gpus {processes}"
        raise ConfigError(
            f"{what}, but {DEVICES}={visible} shows {len(names)} device{'s' * (len(names) != 1)} "
            f"(slots count from 0 in that list). Ask for fewer, show more, or set {DEVICES}= (empty) for the CPU."
        )
    if slots is None:
        return None
    return ",".join(names[slot] if names else str(slot) for slot in slots)


def over_ssh(arguments: Arguments, hosts: Sequence[Host], variables: Mapping[str, str], folder: str) -> list[Command]:
    """An ssh command for each machine; the first one's ranks come first.

    Args:
        variables: what every machine gets, no secrets. folder: where the script is started.

    Raises ConfigError when the other machines could not reach the first by its name.
    """
    address = arguments.master_addr or hosts[0].name
    if not arguments.master_addr and (address == "localhost" or address.startswith("127.")):
        raise ConfigError(
            f"{address} is the first of {len(hosts)} machines, and the others would look for it on themselves. "
            "Give --master_addr, the address at which they reach this one."
        )
    settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
    commands = []
    for rank, host in enumerate(hosts):
        words = [sys.executable, "-m", "megazero.cli", "launch", "--no_ssh", "--until-stdin-closes"]
        words += ["--num_nodes", str(len(hosts)), "--node_rank", str(rank), "--master_addr", address]
        words += ["--master_port", str(arguments.master_port or DEFAULT_PORT)]
        words += ["--include", f"localhost:{','.join(map(str, host.slots))}"]
        words += ["--module"] * arguments.module + ["--no_python"] * arguments.no_python
        started = shlex.join([*words, arguments.script, *arguments.words])
        line = f"cd {shlex.quote(folder)} && exec env {' '.join(settings)} {started}"
        port = ["-p", str(arguments.ssh_port)] if arguments.ssh_port else []
        # BatchMode: a question for a password could not be answered here
        commands.append(Command(("ssh", "-o", "BatchMode=yes", *port, host.login, line), {}))
    return commands


def parse_variables(text: str, name: str) -> dict[str, str]:
    """NAME=value lines of a file of variables for every machine; # begins a comment line.

    Raises ConfigError with the line's number for anything else.
    """
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        key, equals, value = line.strip().partition("=")
        if not line.strip() or line.strip().startswith("#"):
            continue
        if not equals or not key.isidentifier():
            raise ConfigError(f"{name}, line {number}: {line.strip()!r} is not NAME=value.")
        found[key] = value
    return found
