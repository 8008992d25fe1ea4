"""A pool of forked processes that ends as it should: a failed worker fails the run, and no worker outlives the run.

Workers inherit the function by fork (nothing of it is sent), get task numbers over a pipe and answer with progress and
results. When the parent dies its pipes close, and each worker ends at its next read or write.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megazero.base.errors import ConfigError, DataError

Result = TypeVar("Result")
Function = Callable[[int, Callable[[int], None]], Result]


def run_tasks(
    function: Function[Result],
    tasks: Sequence[int],
    workers: int,
    advance: Callable[[int], None],
    started: Callable[[], None],
) -> Iterator[tuple[int, Result]]:
    """(task, result) as they end. `function(task, report)` runs in a worker; what it reports reaches `advance` here.

    `started` is called once the workers exist: threads may be started from then on. Raises what a worker raised
    (MegazeroErrors as they are), and DataError when one was killed.
    """
    pending = list(reversed(tasks))
    crew: dict[Connection, BaseProcess] = {}
    for _ in range(min(workers, len(tasks))):
        _hire(function, crew)
    started()
    try:
        for connection in crew:
            connection.send(pending.pop())
        busy = len(crew)
        while busy:
            for ready in wait(list(crew)):
                assert isinstance(ready, Connection)
                kind, value = _receive(ready, crew[ready])
                if kind == "advance":
                    advance(value)
                    continue
                yield value
                if pending:
                    ready.send(pending.pop())
                else:
                    busy -= 1
    finally:
        for connection in crew:
            connection.close()
        for process in crew.values():
            process.join(0.2)  # an idle worker ends as soon as its pipe does
            if process.is_alive():
                process.terminate()
                process.join()


def _hire(function: Function[Any], crew: dict[Connection, BaseProcess]) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_serve, args=(function, theirs, [ours, *crew]), daemon=True)
    process.start()
    theirs.close()
    crew[ours] = process


def _serve(function: Function[Any], connection: Connection, not_ours: Sequence[Connection]) -> None:
    """A worker's life. It closes the parent's ends of the pipes, or they would stay open when the parent dies."""
    for other in not_ours:
        other.close()
    try:
        while True:
            task = connection.recv()
            try:
                result = function(task, lambda count: connection.send(("advance", count)))
            except (ConfigError, DataError) as error:
                connection.send(("error", error))
            except Exception:  # noqa: BLE001 - raised again in the parent
                connection.send(("crash", traceback.format_exc()))
            else:
                connection.send(("result", (task, result)))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent is done, or gone


def _receive(connection: Connection, process: BaseProcess) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        raise DataError(
            f"a worker process ended with exit code {process.exitcode} (a negative one is a signal; -9 is often the "
            "system running out of memory). Run again to go on; fewer --workers need less memory."
        ) from error
    if kind == "error":
        raise value
    if kind == "crash":
        raise RuntimeError(f"a worker process failed:\n{value}")
    return kind, value
