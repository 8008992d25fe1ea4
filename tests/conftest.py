"""For the whole test tree: the pool of ranks, GPU tests only where there is a GPU, a repeatable hypothesis profile."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.harness import Ranks

settings.register_profile("megazero", deadline=None, derandomize=True)  # a failure must be the same on every machine
settings.load_profile("megazero")


def pytest_configure() -> None:
    """Ctrl-C is tested: a shell's background job ignores SIGINT, and so would every process the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The tables of the parity and numerics suites, if they ran."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    properties = [each for report in reports if report.when == "call" for each in report.user_properties]
    if not properties:
        return
    from tests.numerics import table as numerics  # these import the engine, which other tests can do without
    from tests.parity import table as parity

    everything = config.getoption("verbose") > 0
    for title, lines in (
        ("numbers that do not depend on the layout", parity.tables(properties, everything)),
        ("ZeRO: numbers, volume and bytes", numerics.tables(properties, everything)),
    ):
        if lines:
            terminalreporter.section(title)
            terminalreporter.write("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """A test that joins a process group of one in this process leaves none to the next."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def ranks(request: pytest.FixtureRequest, rank_pool: Ranks) -> Ranks:
    """The pool of gloo ranks: `ranks.run(function, world_size, *args)`; see tests/harness.py."""
    rank_pool.most = 8 if request.node.get_closest_marker("slow") else 4
    return rank_pool
