"""One rank of the test pool: waits for jobs on a pipe, runs each inside a fresh process group, answers.

    parent                         rank
      Job(fn, args, …)     ->        join a new gloo group, run fn
                           <-        Done(value) | Failed(traceback, when)
      Leave                ->        (sent when every rank has answered) leave the group, undo global state
                           <-        Left
      end of file          ->        exit

SIGUSR1 writes the stacks of all threads to the file named on the command line. Started by tests/harness.py.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

LOCALS_WIDTH = 200  # characters of a local variable shown in a traceback


@dataclass(frozen=True)
class Job:
    call: bytes
    """Pickled (function, args); unpickled inside the job, so that a failing import is a failed job."""
    rank: int
    world_size: int
    store: str
    """Path of this job's own rendezvous file."""
    port: int
    """A free port, for MASTER_PORT."""
    timeout: float
    """Seconds that the parent waits."""
    group: bool
    """Join a process group before the call."""


@dataclass(frozen=True)
class Done:
    value: Any


@dataclass(frozen=True)
class Failed:
    traceback: str
    when: float
    """time.monotonic() of the failure, comparable between processes of one machine."""


@dataclass(frozen=True)
class Leave:
    pass


@dataclass(frozen=True)
class Left:
    pass


def answer(job: Job) -> Done | Failed:
    """Run the job; every exception, SystemExit too, becomes a Failed."""
    try:
        if job.group and job.world_size > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(job.store, job.world_size),
                rank=job.rank,
                world_size=job.world_size,
                timeout=timedelta(seconds=job.timeout + 30),  # the harness's own limit comes first and says more
            )
        function, args = pickle.loads(job.call)
        value = function(*args)
        pickle.dumps(value)  # here, where the message can name the function
        return Done(value)
    except BaseException:  # noqa: BLE001  whatever it is, it is the test's result
        return Failed(describe_exception(), time.monotonic())


def describe_exception() -> str:
    """The current exception's traceback, with the local variables of the frames that stand in tests/."""
    error = traceback.TracebackException(*sys.exc_info(), capture_locals=True)
    tests = os.path.dirname(os.path.abspath(__file__))
    chain, seen = [error], set()
    while chain:
        one = chain.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        chain += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        for frame in one.stack:
            is_test = frame.filename.startswith(tests) and frame.filename != __file__
            shown = frame.locals if is_test and frame.locals else {}
            frame.locals = {name: text[:LOCALS_WIDTH] for name, text in shown.items()} or None
    return "".join(error.format())


@contextmanager
def clean_state(job: Job) -> Iterator[None]:
    """Equal starting state for every job, and nothing of a job left behind for the next."""
    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    os.environ.update(launcher_environment(job))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    gc.collect()  # an engine is a cycle; it holds process groups, whose threads live as long
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    if torch.are_deterministic_algorithms_enabled():  # the call imports torch.compile's compiler: seconds of a start
        torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path


def launcher_environment(job: Job) -> dict[str, str]:
    """What torchrun would set."""
    rank, size = str(job.rank), str(job.world_size)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port)}


def serve(connection: Connection) -> None:
    """Answer jobs until the parent closes the pipe."""
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        with clean_state(job):
            connection.send_bytes(pickle.dumps(answer(job)))
            leave = pickle.loads(connection.recv_bytes())
            assert isinstance(leave, Leave)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(pickle.dumps(Left()))


def exit_with_parent(parent: int) -> None:
    """Exit when the test session is gone, even from inside a blocked collective."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(pipe: int, stacks: str, parent: int) -> None:
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115  open for life
    faulthandler.enable()
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays; collections look at what jobs made
    try:
        serve(Connection(pipe))
    except (EOFError, BrokenPipeError):
        return  # the parent gave up on this pool


if __name__ == "__main__":
    from tests import rank_process  # the classes above must be the importable ones, not __main__'s

    rank_process.main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
