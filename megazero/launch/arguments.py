"""The words of `megazero launch`: DeepSpeed's flags, with underscores or dashes, then a script and its own words.

What stands before the script is ours, what stands after it is the script's and is not looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from megazero.base.errors import ConfigError
from megazero.config.decode import did_you_mean


@dataclass(frozen=True)
class Arguments:
    """A launch as asked for. None: not said."""

    script: str
    words: tuple[str, ...] = ()
    """The script's own."""
    num_gpus: int | None = None
    num_nodes: int | None = None
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    node_rank: int | None = None
    no_ssh: bool = False
    ssh_port: int | None = None
    module: bool = False
    no_python: bool = False
    dry_run: bool = False
    until_stdin_closes: bool = field(default=False, repr=False)
    """How a launch on another machine learns that the first one is gone."""


ELSEWHERE = {
    "--launcher": "machines are started over ssh; under SLURM or Kubernetes with --no_ssh (docs/launch.md)",
    "--launcher_args": "ssh takes options from ~/.ssh/config",
    "--force_multi": "several machines are those of the hostfile",
    "--bind_cores_to_rank": "set OMP_NUM_THREADS, or start under numactl or taskset",
    "--bind_core_list": "set OMP_NUM_THREADS, or start under numactl or taskset",
    "--save_pid": "leave it out; the launch's process is the one to signal",
    "--enable_each_rank_log": "leave it out; torchrun has --log-dir",
    "--autotuning": "megazero plan finds the fastest setting that fits",
    "--elastic_training": "a checkpoint loads on any number of ranks: restart with what there is",
    "--min_elastic_nodes": "a checkpoint loads on any number of ranks: restart with what there is",
    "--max_elastic_nodes": "a checkpoint loads on any number of ranks: restart with what there is",
    "--venv_script": "the other machines use the same Python as this one",
}
"""Flags of the `deepspeed` launcher that are not here, and what to do."""


def parse(words: Sequence[str]) -> Arguments:
    """Read the words after `megazero launch`.

    Raises ConfigError for flags that do not exist, values that are no numbers, and flags that exclude each other;
    SystemExit(0) after `--help`.
    """
    found, unknown = _parser().parse_known_args(list(words))
    if unknown:
        elsewhere = ELSEWHERE.get(unknown[0].partition("=")[0].replace("-", "_").replace("__", "--", 1))
        if elsewhere is not None:
            raise ConfigError(f"{unknown[0]} is a flag of DeepSpeed's launcher and not of this one: {elsewhere}.")
        flags = [f"--{action.dest}" for action in _parser()._actions if action.option_strings]
        raise ConfigError(
            f"unknown flag {unknown[0]}.{did_you_mean(unknown[0], flags)} "
            "Flags of the script stand after it; megazero launch --help lists the launcher's."
        )
    values = vars(found)
    arguments = Arguments(**(values | {"words": tuple(values["words"])}))
    problems = list(_problems(arguments))
    if problems:
        raise ConfigError(*problems)
    return arguments


def _problems(arguments: Arguments) -> list[str]:
    found = []
    for name in ("num_gpus", "num_nodes", "master_port"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            found.append(f"--{name} {value}: at least 1.")
    if arguments.include and arguments.exclude:
        found.append("--include and --exclude: give one; each says by itself what is left.")
    for name in ("include", "exclude"):
        if getattr(arguments, name) and arguments.num_gpus is not None:
            found.append(f"--num_gpus and --{name}: give one; --{name} says which devices, and so how many.")
        if getattr(arguments, name) and arguments.num_nodes is not None and not arguments.no_ssh:
            found.append(f"--num_nodes and --{name}: give one; --{name} says which machines, and so how many.")
    nodes = arguments.num_nodes or 1
    if arguments.no_ssh:
        if arguments.node_rank is None:
            found.append(
                "--no_ssh starts this machine's processes alone: say which machine it is with --node_rank 0, 1, …"
            )
        if not arguments.hostfile:
            if nodes > 1 and not arguments.master_addr:
                found.append(
                    f"--no_ssh with --num_nodes {nodes} needs --master_addr, the address of the machine of rank 0."
                )
            if arguments.node_rank is not None and not 0 <= arguments.node_rank < nodes:
                found.append(
                    f"--node_rank {arguments.node_rank} of {nodes} machines: they count from 0. Check --num_nodes."
                )
    elif arguments.node_rank is not None:
        found.append(
            "--node_rank is for --no_ssh, where each machine is started by hand; over ssh machines are counted."
        )
    elif nodes > 1 and not arguments.hostfile:
        found.append(
            f"--num_nodes {nodes} needs --hostfile, which names the machines (a line `host slots=N` for each), or "
            "--no_ssh --node_rank R --master_addr A on every machine."
        )
    if arguments.module and arguments.no_python:
        found.append("--module and --no_python: give one; a module is run by Python.")
    return found


class _Parser(argparse.ArgumentParser):
    """argparse, except that an error is raised instead of printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        if "required: script" in message:
            message = "no script to launch. Write megazero launch --num_gpus 2 train.py, for instance."
        raise ConfigError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megazero launch",
        description="Start a script on several devices and machines: torchrun, one ssh for each machine.",
        usage="megazero launch [--num_gpus N] [--hostfile F] [...] script.py [its own flags]",
        allow_abbrev=False,
    )

    def add(name: str, text: str, short: str | None = None, **shape: object) -> None:
        names = ([short] if short else []) + list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
        parser.add_argument(*names, dest=name, help=text, **shape)  # type: ignore[arg-type]

    add("num_gpus", "processes on each machine (on a CPU too); default: its devices", type=int, metavar="N")
    add("num_nodes", "machines: the first N of the hostfile", type=int, metavar="N")
    add("hostfile", "file with a line `host slots=N` for each machine", "-H", metavar="F")
    add("include", "use only these: host, host:0,2, or several joined by @", "-i", metavar="H:S@…")
    add("exclude", "use all but these", "-e", metavar="H:S@…")
    add("master_addr", "address where ranks meet; default: the first machine", metavar="A")
    add("master_port", "its port; default: a free one, on several machines 29500", type=int, metavar="P")
    add("no_ssh", "start this machine's part alone; each machine runs the same command", action="store_true")
    add("node_rank", "with --no_ssh: which machine this is, from 0", type=int, metavar="R")
    add("ssh_port", "ssh's port", type=int, metavar="P")
    add("module", "the script is a module, as in python -m", "-m", action="store_true")
    add("no_python", "the script is a program, not Python", action="store_true")
    add("dry_run", "print the commands and start nothing", action="store_true")
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("script", metavar="script", help="what to start")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="its own flags")
    return parser
