"""Messages: rank 0 bare, others marked on every line, warnings once and on stderr."""

from __future__ import annotations

from megazero.base.log import Log


def test_rank_zero_is_bare_and_others_are_marked(capsys):
    Log(rank=0).info("hello")
    Log(rank=3).info("one\ntwo")
    assert capsys.readouterr().out == "hello\n[rank 3] one\n[rank 3] two\n"


def test_main_speaks_on_rank_zero_alone(capsys):
    for rank in range(3):
        Log(rank=rank).main("known to all")
    assert capsys.readouterr().out == "known to all\n"


def test_warnings_go_to_stderr_and_once_means_once_for_each_text(capsys):
    log = Log(rank=2)
    for _ in range(3):
        log.warn_once("slow")
        log.warn_once("hot")
    log.warn("slow")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [f"[rank 2] warning: {word}" for word in ("slow", "hot", "slow")]


def test_one_log_does_not_silence_another(capsys):
    Log().warn_once("slow")
    Log().warn_once("slow")
    assert capsys.readouterr().err.count("slow") == 2
