"""Command lines of a tiny model, run in this process, on the ranks of the test pool, or under torchrun as a user does.

train(folder, "--train-iters", "6")            -> exit status, in this process
torchrun(2, folder, …).wait_for(iteration=5)   -> real processes, to be killed and signalled
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from megazero.config.flags import main_config
from megazero.train.entry import run
from megazero.train.loop import pretrain
from megazero.train.records import read_records
from tests.harness import ROOT, rank_environment

MODEL = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2"),
    *("--ffn-hidden-size", "64", "--vocab-size", "64", "--seq-length", "16"),
)
BATCH = ("--micro-batch-size", "2", "--global-batch-size", "8", "--log-interval", "1", "--eval-iters", "1")
TINY = (*MODEL, *BATCH, "--lr", "1e-2", "--train-iters", "6")
MOCK = (*TINY, "--mock-data")
MEASURED = {"iteration_time_ms", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes"}
"""Keys of a metrics line that are measured, so that two equal runs differ in them."""


def command(folder: Path, *flags: str, base: tuple[str, ...] = MOCK) -> list[str]:
    """The flags of the tiny run in `folder`; of a flag given twice the last counts."""
    return [*base, "--output-dir", str(folder), *flags]


def train(folder: Path, *flags: str, base: tuple[str, ...] = MOCK) -> int:
    """What pretrain_gpt.py does with these flags, in this process with one thread; its exit status."""
    return train_argv(command(folder, *flags, base=base))


def train_argv(argv: list[str]) -> int:
    """As `train`, of a whole command line. loss.png is not drawn: that takes half a second."""
    with (
        mock.patch.dict(os.environ, OMP_NUM_THREADS="1"),
        mock.patch("megazero.train.metrics.plot_losses", return_value=False),
    ):
        try:
            return run(pretrain, main_config(argv))
        except SystemExit as leaving:
            return int(leaving.code or 0)


def train_on_rank(argv: list[str]) -> tuple[int, str]:
    """For `ranks.run(…, group=False)`: the exit status and all that was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return train_argv(argv), said.getvalue()


def steps(folder: Path) -> list[dict[str, Any]]:
    """The training lines of a run's metrics.jsonl."""
    return [record for record in read_records(folder / "metrics.jsonl") if "lm_loss" in record]


def losses(folder: Path) -> list[float]:
    return [record["lm_loss"] for record in steps(folder)]


def reproducible(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl without what is measured: equal in two equal runs."""
    records = read_records(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def tensors(folder: Path, iteration: int) -> dict[str, Any]:
    """Size and sha256 of the files with weights and optimizer state in a run's checkpoint."""
    manifest = json.loads((folder / "checkpoints" / f"step_{iteration:08d}" / "MANIFEST.json").read_text())
    return {name: record for name, record in manifest["files"].items() if "/" in name}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def everything_under(folder: Path) -> dict[str, bytes]:
    """Each file's content by its path: equal before and after a command that must not touch anything."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Launched:
    """Processes started as a user starts them, by `torchrun` (or one plain process), and what they say."""

    def __init__(self, words: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=rank_environment() | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 90) -> int:
        """The exit status."""
        return self.process.wait(seconds)

    def wait_for(self, folder: Path, iteration: int, seconds: float = 90) -> None:
        """Until metrics.jsonl has the line of this iteration."""
        self.wait_until(lambda: (folder / "metrics.jsonl").exists() and _last(folder) >= iteration, seconds)

    def wait_until(self, condition: Any, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.said}"
            assert time.monotonic() < end, f"not yet after {seconds} s:\n{self.said}"
            time.sleep(0.01)

    def ranks(self) -> dict[int, int]:
        """The process id of each of torchrun's ranks."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # a process that has ended, or is not ours
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (folder / "environ").read_bytes())
                if rank and _parent(folder) == self.process.pid:
                    found[int(rank[1])] = int(folder.name)
        return found

    def end(self) -> None:
        """Kill whatever is left, the ranks (each in a session of its own) first."""
        if self.process.poll() is None:
            for process in self.ranks().values():
                os.kill(process, signal.SIGKILL)
            self.process.kill()
        self.process.wait()


@contextmanager
def torchrun(ranks: int, log: Path, *argv: str) -> Iterator[Launched]:
    """`torchrun --standalone --nproc-per-node ranks pretrain_gpt.py argv`; nothing of it is left afterwards."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launched = Launched([*launcher, "pretrain_gpt.py", *argv], log)
    try:
        yield launched
    finally:
        launched.end()


@contextmanager
def plain(log: Path, *argv: str, environment: dict[str, str] | None = None) -> Iterator[Launched]:
    """`python pretrain_gpt.py argv`, with the variables of a launcher of one's own if any."""
    launched = Launched(["pretrain_gpt.py", *argv], log, environment)
    try:
        yield launched
    finally:
        launched.end()


def _last(folder: Path) -> int:
    numbers = re.findall(r'"iteration": (\d+)', (folder / "metrics.jsonl").read_text())
    return int(numbers[-1]) if numbers else -1


def _parent(process: Path) -> int:
    """The parent's id in /proc/…/stat: `pid (name) state parent …`."""
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])
