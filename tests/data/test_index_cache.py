"""The index cache: built once, whole or absent, shared by processes, and no obstacle when it cannot be written."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from megazero.data.index_cache import IndexCache


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"a": np.arange(5), "b": np.zeros((2, 3))}


def test_built_once_then_mapped(tmp_path):
    build = Builder()
    for _ in range(3):
        arrays = IndexCache(tmp_path / "c").get({"k": 1}, build)
        assert arrays["a"].tolist() == [0, 1, 2, 3, 4]
        assert isinstance(arrays["b"], np.memmap)
    assert build.calls == 1
    IndexCache(tmp_path / "c").get({"k": 2}, build)
    assert build.calls == 2
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_no_folder_keeps_it_in_memory():
    build = Builder()
    assert IndexCache(None).get({}, build)["a"].sum() == 10
    assert build.calls == 1


@pytest.mark.parametrize("victim", ["a.npy", "manifest.json"])
def test_a_damaged_entry_is_built_again(tmp_path, victim):
    build = Builder()
    IndexCache(tmp_path).get({}, build)
    (path,) = tmp_path.glob(f"*/{victim}")
    path.write_bytes(path.read_bytes()[:20])
    assert IndexCache(tmp_path).get({}, build)["a"].tolist() == [0, 1, 2, 3, 4]
    assert build.calls == 2
    IndexCache(tmp_path).get({}, build)
    assert build.calls == 2


def test_an_unwritable_folder_warns_once_and_works(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache, build = IndexCache(tmp_path / "file" / "c"), Builder()
    for key in (1, 2):
        assert cache.get({"k": key}, build)["a"].sum() == 10
    assert build.calls == 2
    err = capsys.readouterr().err
    assert err.count("cannot write the index cache") == 1
    assert "--data-cache-path" in err


def _build_and_count(folder: str, marks: str, barrier) -> None:
    def build():
        Path(marks, str(os.getpid())).touch()
        return {"a": np.arange(1000)}

    barrier.wait()
    assert IndexCache(folder).get({"k": 1}, build)["a"].sum() == 499500


def test_ranks_of_a_node_build_an_entry_once(tmp_path):
    (tmp_path / "marks").mkdir()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    args = (str(tmp_path / "cache"), str(tmp_path / "marks"), barrier)
    ranks = [context.Process(target=_build_and_count, args=args) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len(list((tmp_path / "marks").iterdir())) == 1
