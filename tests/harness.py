"""A pool of gloo ranks that lives as long as the test session: process start and `import torch` are paid once.

    def check_sum(scale):                        # at the top level of the test file; runs on every rank
        x = torch.ones(4) * dist.get_rank() * scale
        dist.all_reduce(x)
        assert x[0] == 6 * scale                 # fails the test, with this rank's traceback and local variables
        return x[0].item()                       # anything that pickles; better no big tensors

    def test_sum(ranks):                         # `ranks` is a fixture of tests/conftest.py
        assert ranks.run(check_sum, 4, 10.0) == [60.0] * 4         # results by rank

Every call gets a fresh default process group of exactly `world_size` gloo ranks (none for world_size 1), seed 0, and
the environment that torchrun would set. With `group=False` the function makes the process group itself, as a program
under torchrun does. More than 4 ranks need `@pytest.mark.slow`. Module globals stay in the processes between calls, so
keep no state there. To test that ranks raise, use pytest.raises inside the function. What ranks print is shown with
the test's own output.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from tests.rank_process import Done, Failed, Job, Leave, Left

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0  # a rank's own start and `import torch`, on a busy machine
GRACE_SECONDS = 3.0  # for the other ranks to answer after the first failure
LEAVE_SECONDS = 20.0  # to take a process group down
OUTPUT_CHARACTERS = 6000  # of a rank's output shown with a failure


class RankFailure(AssertionError):
    """What went wrong on which ranks, the first failure first."""


@dataclass(frozen=True)
class Trouble:
    rank: int
    title: str
    detail: str
    order: tuple[int, float]
    """Deaths come first, since they make the others fail; then by time; ranks that never answered come last."""


@dataclass
class RankProcess:
    """The parent's end of one rank: process, pipe, and files for its output and its stacks."""

    rank: int
    process: subprocess.Popen[bytes]
    pipe: Connection
    output: Path
    stacks: Path
    shown: int = 0
    """Bytes of `output` that belong to earlier calls."""

    @classmethod
    def start(cls, rank: int, folder: Path) -> RankProcess:
        ours, theirs = Pipe()
        output, stacks = folder / f"output-{rank}", folder / f"stacks-{rank}"
        with theirs, output.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.rank_process", str(theirs.fileno()), str(stacks), str(os.getpid())],
                cwd=ROOT,
                env=rank_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        return cls(rank, process, ours, output, stacks)

    def send(self, message: Job | Leave) -> None:
        try:
            self.pipe.send_bytes(pickle.dumps(message))
        except BrokenPipeError:
            return  # it died: receive() says how

    def receive(self) -> Done | Failed | Left | Trouble:
        """The rank's answer, or how it died. Call when the pipe is ready."""
        try:
            return pickle.loads(self.pipe.recv_bytes())  # type: ignore[no-any-return]
        except (EOFError, ConnectionResetError):
            return Trouble(self.rank, f"rank {self.rank} {self.ending()}", "", (0, 0.0))

    def ending(self) -> str:
        """How the process ended."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "closed its pipe but does not end. Its stack:\n" + self.stack()
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"exited with code {code}"

    def new_output(self) -> str:
        """What it wrote since the last time this was asked."""
        data = self.output.read_bytes()[self.shown :]
        self.shown += len(data)
        return data.decode(errors="replace")

    def stack(self) -> str:
        """The Python stacks of its threads, now, wherever they are blocked."""
        before = self.stacks.stat().st_size if self.stacks.exists() else 0
        self.process.send_signal(signal.SIGUSR1)
        size, deadline = before, time.monotonic() + 5
        while time.monotonic() < deadline:
            time.sleep(0.05)
            grown = self.stacks.stat().st_size if self.stacks.exists() else 0
            if grown == size > before:
                break
            size = grown
        return self.stacks.read_text()[before:] or "(it did not answer SIGUSR1)"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Ranks:
    """The pool. Processes start when first needed and stay; after any failure all are stopped, and the next call
    starts new ones."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="megazero-ranks-"))
        self._pool: list[RankProcess] = []
        self._calls = 0
        self.most = 4
        """Largest world size that the present test may ask for; the fixture sets it."""

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 60,
        group: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(*args, **kwargs)` on ranks 0 … world_size-1 and return their results by rank.

        `timeout` is in seconds, from the moment when the processes are up; `group=False` makes no process group.
        Raises RankFailure (an AssertionError) when a rank raises, dies or hangs.
        """
        __tracebackhide__ = True
        if not 1 <= world_size <= self.most:
            raise ValueError(
                f"world_size={world_size}: a test may use 1 to {self.most} ranks; mark it `slow` to use up to 8"
            )
        call = pickle_call(function, args, kwargs)
        name = f"{function.__module__}.{function.__qualname__}" if hasattr(function, "__qualname__") else repr(function)
        try:
            self._start(world_size)
            return self._run(name, Job(call, 0, world_size, "", free_port(), timeout, group))
        except BaseException:  # KeyboardInterrupt and pytest-timeout's too: the ranks' state is unknown
            self.close()
            raise

    def pids(self) -> list[int]:
        """Process ids of the ranks that are up now."""
        return [member.process.pid for member in self._pool]

    def close(self) -> None:
        """Stop all processes. The next `run` starts new ones."""
        for member in self._pool:
            member.kill()
        self._pool = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, world_size: int) -> None:
        self._folder.mkdir(exist_ok=True)
        new = [RankProcess.start(rank, self._folder) for rank in range(len(self._pool), world_size)]
        self._pool += new
        if new:  # a first job that does nothing: the start does not eat into a test's own time
            job = Job(pickle_call(nothing, (), {}), 0, 1, "", 0, START_SECONDS, group=False)
            self._run("(start of the ranks)", job, new)

    def _run(self, name: str, job: Job, members: list[RankProcess] | None = None) -> list[Any]:
        """Send the job to the members (each alone if they are given, else together), collect, take the group down."""
        __tracebackhide__ = True
        together = members is None
        members = self._pool[: job.world_size] if members is None else members
        self._calls += 1
        store = str(self._folder / f"store-{self._calls}")
        for member in members:
            member.send(replace(job, rank=member.rank if together else 0, store=store))
        answers, troubles = collect(members, job.timeout)
        if not troubles:
            for member in members:
                member.send(Leave())
            _, troubles = collect(members, LEAVE_SECONDS, "leave the process group")
        output = {member.rank: member.new_output() for member in members}
        if troubles:
            raise RankFailure(report(name, len(members), troubles, output))
        for rank, text in output.items():
            if text:
                print(f"[rank {rank}] " + text.rstrip("\n").replace("\n", f"\n[rank {rank}] "))
        return [answers[member.rank].value for member in members]


def collect(members: list[RankProcess], seconds: float, what: str = "finish") -> tuple[dict[int, Any], list[Trouble]]:
    """Wait for one answer of each member; return the answers by rank and, sorted, what went wrong.

    After the first failure the others have GRACE_SECONDS: mostly they wait for the failed rank inside a collective.
    """
    answers: dict[int, Any] = {}
    troubles: list[Trouble] = []
    waiting: dict[Any, RankProcess] = {member.pipe: member for member in members}
    deadline = time.monotonic() + seconds
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            member = waiting.pop(pipe)
            answer = member.receive()
            if isinstance(answer, Failed):
                answer = Trouble(member.rank, f"rank {member.rank} failed", answer.traceback, (1, answer.when))
            if isinstance(answer, Trouble):
                if not troubles:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                troubles.append(answer)
            else:
                answers[member.rank] = answer
    why = "when the others had failed" if troubles else f"after {seconds:g} s"
    for member in waiting.values():
        title = f"rank {member.rank} did not {what}: still running {why}. Its stack"
        troubles.append(Trouble(member.rank, title, member.stack(), (2, 0.0)))
    return answers, sorted(troubles, key=lambda trouble: trouble.order)


def report(name: str, world_size: int, troubles: list[Trouble], output: dict[int, str]) -> str:
    """The text of a RankFailure."""
    named = ", ".join(str(trouble.rank) for trouble in troubles)
    lines = [f"{name} on {world_size} rank{'s' * (world_size != 1)}: trouble on rank {named} (in this order)"]
    for trouble in troubles:
        lines += ["", f"======== {trouble.title} ========", trouble.detail.rstrip()]
        text = output.get(trouble.rank, "")
        if text:
            lines += [f"-------- output of rank {trouble.rank} --------", text[-OUTPUT_CHARACTERS:].rstrip()]
    return "\n".join(lines)


def pickle_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The call as bytes. Functions travel by name, so they must stand at the top level of a module."""
    try:
        return pickle.dumps((partial(function, **kwargs) if kwargs else function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"cannot send {function!r} to the ranks: {error}. Use a function at the top level of a test file, "
            "with arguments that pickle"
        ) from error


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nothing() -> None:
    """The job that waits until a process is up."""


def rank_environment() -> dict[str, str]:
    """This process's environment, one thread a rank, gloo on the loopback device, and nothing of another launcher's."""
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in launcher and not name.startswith("TORCHELASTIC_")
    }
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # no host name look-up
    return environment
