"""Hostfiles, --include and --exclude: what they select, and what every mistake says."""

from __future__ import annotations

import pytest

from megazero.base.errors import ConfigError
from megazero.launch.hostfile import Host, excluded, included, parse_hostfile

TEXT = """# the first rack
worker-0 slots=4

worker-1  slots=2   # the old one
"""
HOSTS = [Host("worker-0", (0, 1, 2, 3)), Host("worker-1", (0, 1))]


def test_hosts_stand_in_the_order_of_their_lines() -> None:
    assert parse_hostfile(TEXT, "hosts") == HOSTS


def test_a_user() -> None:
    (host,) = parse_hostfile("me@worker-0 slots=1", "hosts")
    assert (host, host.login) == (Host("worker-0", (0,), "me"), "me@worker-0")
    assert included([host], "worker-0")[0].login == "me@worker-0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("worker-0 slots=4\nworker-1\n", "hosts, line 2: 'worker-1' is not `host slots=N`"),
        ("worker-0 slot=4", "hosts, line 1: 'worker-0 slot=4' is not"),
        ("worker-0 slots=four", "is not `host slots=N`. Write `worker-1 slots=8`, say."),
        ("a slots=1\nb slots=1\na slots=2", "hosts, line 3: a stands on line 1 already. Give a host one line"),
        ("a slots=1\nme@a slots=2", "hosts, line 2: a stands on line 1 already."),
        ("a slots=0", "hosts, line 1: slots=0 starts nothing on a. Remove the line."),
        ("# nothing\n\n", "hosts names no host. Write a line `host slots=N` for each."),
    ],
)
def test_bad_hostfiles(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(text, "hosts")
    assert words in str(caught.value)


def test_all_bad_lines_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hostfile("a\nb slots=1\nc slots=x\n", "hosts")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("worker-1", [Host("worker-1", (0, 1))]),
        ("worker-1:1@worker-0:3,1", [Host("worker-0", (1, 3)), Host("worker-1", (1,))]),
    ],
)
def test_include(text: str, hosts: list[Host]) -> None:
    assert included(HOSTS, text) == hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("worker-1", HOSTS[:1]),
        ("worker-0:0,1@worker-1:1", [Host("worker-0", (2, 3)), Host("worker-1", (0,))]),
        ("worker-1:0,1", HOSTS[:1]),
    ],
)
def test_exclude(text: str, hosts: list[Host]) -> None:
    assert excluded(HOSTS, text) == hosts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("worker-2", "--include worker-2: no host worker-2. Did you mean 'worker-1'? There are worker-0, worker-1."),
        ("worker-1:2", "--include worker-1:2: worker-1 has no slot 2; it has 2, counted from 0."),
        ("worker-1:a", "'worker-1:a' is not `host` or `host:0,1`. Join several with @: a:0,1@b:2."),
        ("worker-0@@worker-1", "'' is not `host`"),
        ("worker-0:1@worker-0:2", "worker-0 stands there twice. Give its slots at once: worker-0:0,1."),
    ],
)
def test_bad_filters(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        included(HOSTS, text)
    assert words in str(caught.value)


def test_something_must_be_left() -> None:
    with pytest.raises(ConfigError, match=r"no slot of any host is left. Exclude fewer."):
        excluded(HOSTS, "worker-0@worker-1")
