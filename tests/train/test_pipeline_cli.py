"""Pipelines from the command line: the losses, norms and validation of one process, checkpoints across layouts, and a
rank that dies in the middle."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from megazero.train.records import read_records
from tests.train.command import checkpoints, command, losses, steps, torchrun, train, train_on_rank

DEBUG = (
    *("--recipe", "recipes/debug_cpu.yaml", "--num-layers", "4", "--train-iters", "3"),
    *("--global-batch-size", "16", "--eval-iters", "1"),
)
PP2, PP4 = (("--pipeline-model-parallel-size", size) for size in "24")
TIED = ("--no-untie-embeddings-and-output-weights", "--add-bias-linear", "--normalization", "LayerNorm")
LAYOUTS = {
    "pp2 1f1b": (2, (*PP2, "--pipeline-schedule", "1f1b")),
    "pp2 interleaved": (2, (*PP2, "--pipeline-schedule", "interleaved-1f1b")),
    "pp2 zbv": (2, (*PP2, "--pipeline-schedule", "zbv")),
    "pp2 dualpipev": (2, (*PP2, "--pipeline-schedule", "dualpipev")),
    "pp2 dp2": (4, PP2),
    "pp2 tp2": (4, (*PP2, "--tensor-model-parallel-size", "2")),
    "pp4": (4, PP4),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert train(folder, base=DEBUG) == 0
    return folder


def validations(folder):
    return [r["validation_loss"] for r in read_records(folder / "metrics.jsonl") if "validation_loss" in r]


def assert_same_run(one, other):
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    norms = [[record["grad_norm"] for record in steps(folder)] for folder in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert validations(one) == pytest.approx(validations(other), rel=1e-5)
    assert len(validations(one)) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_are_those_of_one_process(ranks, tmp_path, alone, layout):
    world, flags = LAYOUTS[layout]
    results = ranks.run(train_on_rank, world, command(tmp_path, *flags, base=DEBUG), group=False)
    assert [status for status, _ in results] == [0] * world, results
    assert_same_run(tmp_path, alone)
    assert f"pipeline: {4 if 'v' in layout else int(flags[1])} stages" in results[0][1], "the cut is printed"
    assert not any("pipeline:" in said for _, said in results[1:])


def test_under_torchrun(tmp_path, alone):
    flags = (*PP2, "--num-virtual-stages-per-pipeline-rank", "2")
    with torchrun(2, tmp_path / "log", *command(tmp_path / "two", *flags, base=DEBUG)) as run:
        assert run.wait() == 0, run.said
    assert_same_run(tmp_path / "two", alone)
    assert run.said.count("iteration        3/       3") == 1, "one rank alone speaks"


@pytest.mark.parametrize("weights", ["untied", "tied"])
def test_checkpoints_go_from_layout_to_layout(ranks, tmp_path, weights):
    """One step on each: 1 process, pp 2, tp 2, pp 2 in a V, pp 4, 1 process; against 6 steps in one process."""
    flags = (*(TIED if weights == "tied" else ()), "--train-iters", "6")
    assert train(tmp_path / "whole", *flags, base=DEBUG) == 0
    tp2 = (2, ("--tensor-model-parallel-size", "2"))
    order = [(1, ()), LAYOUTS["pp2 1f1b"], tp2, LAYOUTS["pp2 zbv"], LAYOUTS["pp4"], (1, ())]
    for step, (world, more) in enumerate(order, start=1):
        argv = command(tmp_path / "moved", *flags, *more, "--exit-interval", "1", base=DEBUG)
        for status, said in ranks.run(train_on_rank, world, argv, group=False):
            assert status == 0, said
        assert checkpoints(tmp_path / "moved")[-1] == step
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    norms = [[record["grad_norm"] for record in steps(tmp_path / name)] for name in ("moved", "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_a_killed_rank_stops_the_pipeline(tmp_path):
    """Named: the rank that is gone and its place in the pipeline; what a rank that loses another did in it is a test
    of tests/parallel/test_pipeline.py."""
    argv = command(tmp_path, *PP2, "--train-iters", "100000", "--lr-decay-style", "constant", base=DEBUG)
    with torchrun(2, tmp_path / "log", *argv) as run:
        run.wait_for(tmp_path, iteration=2)
        os.kill(run.ranks()[1], signal.SIGKILL)
        began = time.monotonic()
        assert run.wait() == 1
        assert time.monotonic() - began < 60
    line = next(line for line in run.said.splitlines() if "stopped answering" in line)
    assert line.startswith("[rank 0] error: rank 1 stopped answering in iteration")
    assert " (pp 1); this rank stops too" in line
