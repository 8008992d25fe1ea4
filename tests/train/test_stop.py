"""Runs that are killed, signalled or lose a rank: what is said, what is saved, and that the same command goes on.

Real processes, because signals and dead ranks are what is tested; so each test takes seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import ExitStack

import pytest

from tests.harness import free_port
from tests.train.command import checkpoints, command, plain, reproducible, steps, tensors, torchrun

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")

ITERATIONS = 40
LONG = ("--train-iters", str(ITERATIONS), "--save-interval", "5", "--eval-interval", "20", "--hidden-dropout", "0.1")
ENDLESS = ("--train-iters", "100000", "--lr-decay-style", "constant")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run on two ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    with torchrun(2, folder / "log", *command(folder, *LONG)) as run:
        assert run.wait() == 0, run.said
    return folder


def finish(folder, whole):
    """The same command again: it says where it resumes, and all numbers are those of the undisturbed run."""
    before = checkpoints(folder)[-1]
    with torchrun(2, folder / "again", *command(folder, *LONG)) as run:
        assert run.wait() == 0, run.said
    assert f"resuming from {folder}/checkpoints, iteration {before}" in run.said
    assert [record["iteration"] for record in steps(folder)] == list(range(1, ITERATIONS + 1))
    assert reproducible(folder) == reproducible(whole)
    assert tensors(folder, ITERATIONS) == tensors(whole, ITERATIONS)


def test_a_killed_rank_is_named_and_the_same_command_goes_on(tmp_path, whole):
    with torchrun(2, tmp_path / "log", *command(tmp_path, *LONG)) as run:
        run.wait_for(tmp_path, iteration=12)
        os.kill(run.ranks()[1], signal.SIGKILL)
        began = time.monotonic()
        assert run.wait() == 1
        assert time.monotonic() - began < 60
    assert "[rank 0] error: rank 1 stopped answering in iteration" in run.said
    assert "The same command resumes from the last checkpoint" in run.said
    assert 10 <= checkpoints(tmp_path)[-1] < ITERATIONS
    finish(tmp_path, whole)


@pytest.mark.slow
def test_a_killed_rank_of_four_is_named_by_all_others(tmp_path):
    """Ranks 0 and 3 share no group: rank 0 is stuck with ranks that wait for rank 3, and is not to be blamed."""
    argv = command(tmp_path, *ENDLESS, "--tensor-model-parallel-size", "2")
    with torchrun(4, tmp_path / "log", *argv) as run:
        run.wait_for(tmp_path, iteration=3)
        os.kill(run.ranks()[3], signal.SIGKILL)
        began = time.monotonic()
        assert run.wait() == 1
        assert time.monotonic() - began < 60
    named = [line for line in run.said.splitlines() if "stopped answering" in line]
    assert named
    assert all("error: rank 3 stopped answering" in line for line in named)


@pytest.mark.parametrize("dies", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_without_torchrun_the_survivor_stops_too(tmp_path, dies):
    """Ranks started one by one, as a scheduler does; with rank 0 dies the store that ranks meet at."""
    port = free_port()
    with ExitStack() as stack:
        runs = []
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            argv = command(tmp_path, *ENDLESS)
            runs.append(stack.enter_context(plain(tmp_path / f"log{rank}", *argv, environment=place)))
        runs[0].wait_for(tmp_path, iteration=2)
        runs[dies].process.kill()
        began = time.monotonic()
        assert runs[1 - dies].wait() == 1
        assert time.monotonic() - began < 60
    assert f"[rank {1 - dies}] error: rank {dies} stopped answering" in runs[1 - dies].said


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(tmp_path, whole, number):
    with torchrun(2, tmp_path / "log", *command(tmp_path, *LONG)) as run:
        run.wait_for(tmp_path, iteration=7)
        run.process.send_signal(number)
        assert run.wait() != 0, "torchrun's own status: it was told to stop"
    reached = checkpoints(tmp_path)[-1]
    assert 7 <= reached < ITERATIONS
    assert f"stopped after iteration {reached} of {ITERATIONS} ({number.name}); checkpoint saved in" in run.said
    assert "The same command goes on from there" in run.said
    assert "Error" not in run.said.replace("SignalException", "").split("stopped after")[0]
    assert steps(tmp_path)[-1]["iteration"] == reached
    finish(tmp_path, whole)


@pytest.mark.slow
def test_a_signal_to_everyone_counts_once(tmp_path):
    """A scheduler tells torchrun and the ranks, and torchrun tells the ranks again: that is still one wish to stop."""
    with torchrun(2, tmp_path / "log", *command(tmp_path, *ENDLESS)) as run:
        run.wait_for(tmp_path, iteration=3)
        for process in (*run.ranks().values(), run.process.pid):
            os.kill(process, signal.SIGTERM)
        run.wait()
    assert "(SIGTERM); checkpoint saved in" in run.said
    assert "stopped at once" not in run.said
    assert steps(tmp_path)[-1]["iteration"] == checkpoints(tmp_path)[-1]


class TestOneProcess:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
    def test_a_signal_saves_and_ends_with_status_0(self, tmp_path, number):
        with plain(tmp_path / "log", *command(tmp_path, *ENDLESS)) as run:
            run.wait_for(tmp_path, iteration=3)
            run.process.send_signal(number)
            assert run.wait() == 0, run.said
        reached = checkpoints(tmp_path)
        assert f"stopped after iteration {reached[0]} of 100000 ({number.name}); checkpoint saved in" in run.said
        assert len(reached) == 1

    @pytest.mark.slow
    def test_a_second_signal_later_stops_at_once(self, tmp_path):
        """A step that takes minutes: whoever presses Ctrl-C again does not want to wait for its end."""
        slow = ("--hidden-size", "512", "--num-layers", "16", "--seq-length", "512", "--global-batch-size", "4000")
        with plain(tmp_path / "log", *command(tmp_path, *slow, "--eval-iters", "0")) as run:
            run.wait_until(lambda: (tmp_path / "metrics.jsonl").exists())
            time.sleep(1)
            run.process.send_signal(signal.SIGINT)
            time.sleep(6)  # sooner, it may be the launcher that passes the same Ctrl-C on
            assert run.process.poll() is None
            run.process.send_signal(signal.SIGINT)
            assert run.wait(30) == 130, run.said
        assert "stopped at once; what came after the last checkpoint is lost" in run.said
        assert "Traceback" not in run.said

    def test_a_signal_while_it_starts_ends_it_and_leaves_nothing(self, tmp_path):
        """It waits for rank 1, which never comes."""
        port = free_port()
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with plain(tmp_path / "log", *command(tmp_path / "run"), environment=place) as run:
            run.wait_until(lambda: _listens(port))
            run.process.send_signal(signal.SIGTERM)
            assert run.wait(30) == -signal.SIGTERM
        assert not (tmp_path / "run").exists()


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
