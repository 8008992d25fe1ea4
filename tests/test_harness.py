"""The pool of ranks itself: results, isolation, and what it says when a rank fails, hangs or dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankFailure, Ranks


def sum_of_ranks(scale: float) -> tuple[float, int, int]:
    x = torch.full((3,), scale * dist.get_rank())
    dist.all_reduce(x)
    return x[0].item(), dist.get_rank(), dist.get_world_size()


def pid() -> int:
    return os.getpid()


def has_group() -> bool:
    return dist.is_initialized()


def launcher_environment() -> tuple[str, str, str]:
    return os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]


def join_as_launched() -> tuple[float, int, int]:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")  # from the environment
    return sum_of_ranks(1.0)


def spoil(folder: str) -> None:
    os.chdir(folder)
    os.environ["SPOILED"] = "yes"
    sys.path.insert(0, folder)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(7)


def observe(folder: str) -> tuple[str, str | None, bool, torch.dtype, bool, float]:
    found = folder in sys.path
    state = (os.getcwd(), os.environ.get("SPOILED"), found, torch.get_default_dtype(), torch.is_grad_enabled())
    return (*state, torch.rand(()).item())


def fail_on_rank_two() -> None:
    print("about to compare")
    if dist.get_rank() == 2:
        wanted, got = 11, 12
        assert wanted == got
    dist.barrier()  # the others wait here for a rank that never comes


def fail_in_turn() -> None:
    time.sleep({1: 0.0, 0: 0.5}[dist.get_rank()])
    raise ValueError(f"failure of rank {dist.get_rank()}")


def hang_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        sleep_for_ever()
    dist.barrier()


def sleep_for_ever() -> None:
    time.sleep(3600)


def die(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    dist.barrier()


def leave_work_behind() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.empty(1), src=1)


def exit_politely() -> None:
    sys.exit("no such file")


def talk() -> None:
    print("hello\nworld")


def return_lambda() -> object:
    return lambda: None


def add(a: int, *, b: int) -> int:
    return a + b


def keep_tensor(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_meet_in_a_group_of_exactly_the_asked_size(ranks: Ranks, world_size: int) -> None:
    total = 2.0 * sum(range(world_size))
    assert ranks.run(sum_of_ranks, world_size, 2.0) == [(total, rank, world_size) for rank in range(world_size)]


def test_one_rank_has_no_process_group(ranks: Ranks) -> None:
    assert ranks.run(has_group, 1) == [False]
    assert ranks.run(has_group, 2) == [True, True]
    assert ranks.run(has_group, 1) == [False]


def test_processes_are_reused(ranks: Ranks) -> None:
    first = ranks.run(pid, 4)
    assert len(set(first)) == 4
    assert os.getpid() not in first
    assert ranks.run(pid, 4) == first
    assert ranks.run(pid, 2) == first[:2]
    assert ranks.pids()[:4] == first


def test_ranks_look_launched(ranks: Ranks) -> None:
    assert ranks.run(launcher_environment, 2) == [("0", "0", "2"), ("1", "1", "2")]


def test_ranks_may_make_the_process_group_themselves(ranks: Ranks) -> None:
    for _ in range(2):
        assert ranks.run(join_as_launched, 3, group=False) == [(3.0, rank, 3) for rank in range(3)]


def test_calls_do_not_see_each_other(ranks: Ranks, tmp_path: Path) -> None:
    before = ranks.run(observe, 2, str(tmp_path))
    ranks.run(spoil, 2, str(tmp_path))
    assert ranks.run(observe, 2, str(tmp_path)) == before
    assert before[0][1:5] == (None, False, torch.float32, True)


def test_arguments_and_results_may_hold_tensors(ranks: Ranks) -> None:
    results = ranks.run(keep_tensor, 2, torch.arange(3))
    assert [r.tolist() for r in results] == [[0, 2, 4]] * 2
    assert ranks.run(add, 2, 1, b=2) == [3, 3]


def test_output_of_ranks_is_passed_on(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.run(talk, 2)
    assert capsys.readouterr().out == "[rank 0] hello\n[rank 0] world\n[rank 1] hello\n[rank 1] world\n"


def test_failure_shows_traceback_locals_and_output_and_frees_the_others(ranks: Ranks) -> None:
    ranks.run(pid, 4)
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        ranks.run(fail_on_rank_two, 4, timeout=120)
    text = str(caught.value)
    assert time.monotonic() - start < 60  # GRACE_SECONDS on a busy machine, not the limit of the call
    first, *others = text.split("========")[1::2]
    assert first.strip() == "rank 2 failed"
    assert len(others) == 3
    assert "fail_on_rank_two on 4 ranks" in text
    assert "assert wanted == got" in text
    assert "wanted = 11" in text
    assert "about to compare" in text
    assert ranks.run(sum_of_ranks, 2, 1.0)[0][0] == 1.0  # the pool is back


def test_first_failure_comes_first(ranks: Ranks) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(fail_in_turn, 2)
    text = str(caught.value)
    assert "trouble on rank 1, 0" in text
    assert 0 < text.index("ValueError: failure of rank 1") < text.index("ValueError: failure of rank 0")


def test_hang_shows_the_stack_of_every_rank(ranks: Ranks) -> None:
    ranks.run(pid, 2)
    old = ranks.pids()
    with pytest.raises(RankFailure) as caught:
        ranks.run(hang_on_rank_zero, 2, timeout=1)
    text = str(caught.value)
    assert "rank 0 did not finish: still running after 1 s" in text
    assert "rank 1 did not finish: still running after 1 s" in text
    assert "in sleep_for_ever" in text
    assert "in barrier" in text
    assert not set(old) & set(ranks.run(pid, 2))


@pytest.mark.parametrize(
    ("how", "words"), [("signal", "was killed by signal 9 (SIGKILL)"), ("exit", "exited with code 3")]
)
def test_death_is_reported_first(ranks: Ranks, how: str, words: str) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(die, 2, how)
    text = str(caught.value)
    assert text.split("========")[1].strip() == f"rank 1 {words}"
    assert ranks.run(has_group, 2) == [True, True]


def test_rank_killed_between_calls_is_reported_and_replaced(ranks: Ranks) -> None:
    victim = ranks.run(pid, 2)[1]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(RankFailure, match=r"rank 1 was killed by signal 9"):
        ranks.run(sum_of_ranks, 2, 1.0)
    assert victim not in ranks.run(pid, 2)


def test_exit_of_a_rank_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="SystemExit: no such file"):
        ranks.run(exit_politely, 1)


def test_a_rank_that_waits_for_one_that_returned_is_a_hang(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="rank 0 did not finish"):
        ranks.run(leave_work_behind, 2, timeout=1)


def test_functions_must_be_at_the_top_level(ranks: Ranks) -> None:
    with pytest.raises(TypeError, match="top level of a test file"):
        ranks.run(lambda: None, 1)


def test_results_must_pickle(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="return_lambda"):
        ranks.run(return_lambda, 1)


def test_world_size_is_limited(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="world_size=5: a test may use 1 to 4 ranks; mark it `slow`"):
        ranks.run(pid, 5)


@pytest.mark.slow
def test_slow_tests_may_use_eight(ranks: Ranks) -> None:
    assert ranks.run(sum_of_ranks, 8, 1.0)[7] == (28.0, 7, 8)


def test_ranks_end_with_the_pool() -> None:
    pool = Ranks()
    (process,) = pool.run(pid, 1)
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
