"""Context parallelism from the command line: the same run as on one process, checkpoints and generation included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megazero.parallel.topology import Topology
from megazero.train.build import build_engine
from tests.parity.measure import VOCABULARY, Layout, configure
from tests.train.command import checkpoints, command, losses, read_records, steps, train, train_on_rank

PACKED = ("--reset-attention-mask", "--reset-position-ids", "--eval-interval", "3")
CP2 = ("--context-parallel-size", "2")


@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_two_ranks_equal_one_process(ranks: Any, tmp_path: Any, comm: str) -> None:
    """Packed documents, validation, and a resume on one process of what two have saved."""
    assert train(tmp_path / "one", *PACKED) == 0
    argv = command(tmp_path / "two", *PACKED, *CP2, "--cp-comm-type", comm, "--exit-interval", "4")
    for status, said in ranks.run(train_on_rank, 2, argv, group=False):
        assert status == 0, said
    assert checkpoints(tmp_path / "two") == [4]
    assert train(tmp_path / "two", *PACKED) == 0
    for key in ("lm_loss", "grad_norm"):
        mine, its = ([step[key] for step in steps(tmp_path / name)] for name in ("two", "one"))
        assert len(mine) == 6
        assert mine == pytest.approx(its, rel=1e-5)
    mine, its = (
        {r["iteration"]: r["validation_loss"] for r in read_records(tmp_path / name / "metrics.jsonl") if len(r) == 3}
        for name in ("two", "one")
    )
    assert mine.keys() == its.keys() == {0, 3, 6}
    assert mine == pytest.approx(its, rel=1e-5)
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]


def logits(comm: str, cp: int) -> Tensor:
    """Of a prompt whose length divides by nothing."""
    layout = Layout(cp=cp, cp_comm=comm)
    engine, forward = build_engine(configure(layout, cp, {}), Topology.build(cp=cp, cp_comm=comm), torch.device("cpu"))  # type: ignore[arg-type]
    engine.module.eval()
    tokens = torch.arange(7).unsqueeze(0) % VOCABULARY
    with torch.no_grad():
        return forward.through(engine.module, {"tokens": tokens}, None)


@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_a_prompt_goes_whole_through_every_rank(ranks: Any, comm: str) -> None:
    wanted = logits("p2p", 1)
    assert wanted.shape == (1, 7, VOCABULARY)
    for found in ranks.run(logits, 2, comm, 2):
        torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_compiled_equals_eager(ranks: Any, tmp_path: Any, comm: str) -> None:
    flags = (*CP2, "--cp-comm-type", comm, "--train-iters", "2")
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        argv = command(tmp_path / name, *flags, *more)
        for status, said in ranks.run(train_on_rank, 2, argv, group=False, timeout=240):
            assert status == 0, said
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
