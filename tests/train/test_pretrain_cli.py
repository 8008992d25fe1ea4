"""pretrain_gpt.py from the command line to metrics.jsonl: layouts, what a run writes, how it ends, and the switches."""

from __future__ import annotations

import math

import pytest

from megazero.train.records import read_records
from tests.train.command import (
    MOCK,
    checkpoints,
    command,
    losses,
    reproducible,
    steps,
    tensors,
    torchrun,
    train,
    train_argv,
    train_on_rank,
)

DEBUG = ("--recipe", "recipes/debug_cpu.yaml", "--train-iters", "2")
SMALL = (*DEBUG, "--num-layers", "2", "--global-batch-size", "8")
TP2 = ("--tensor-model-parallel-size", "2")
LAYOUTS = {
    "tp2": (2, TP2),
    "dp2": (2, ()),
    "dp2, zero 0": (2, ("--zero-stage", "0")),
    "tp2 dp2": (4, TP2),
    "tp2 dp2, zero 0": (4, (*TP2, "--zero-stage", "0")),
    "tp4": (4, ("--tensor-model-parallel-size", "4")),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert train(folder, base=SMALL) == 0
    return folder


def assert_same_training(one, other):
    """Equal to the tolerances that DESIGN.md gives two layouts in fp32."""
    assert [record["iteration"] for record in one] == [record["iteration"] for record in other]
    for a, b in zip(one, other, strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=1e-5), a["iteration"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["iteration"]
        for key in ("consumed_samples", "consumed_tokens", "learning_rate", "skipped_iterations"):
            assert a[key] == b[key], key


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout_trains_alike(self, ranks, tmp_path, alone, layout):
        world, flags = LAYOUTS[layout]
        for status, said in ranks.run(train_on_rank, world, command(tmp_path, *flags, base=SMALL), group=False):
            assert status == 0, said
        assert_same_training(steps(tmp_path), steps(alone))
        mine, its = ([r["validation_loss"] for r in read_records(f / "metrics.jsonl") if "validation_loss" in r]
                     for f in (tmp_path, alone))  # fmt: skip
        assert mine == pytest.approx(its, rel=1e-5)
        assert len(mine) == 2

    def test_the_debug_recipe_itself_under_torchrun(self, tmp_path):
        with torchrun(4, tmp_path / "log", *command(tmp_path / "four", *TP2, base=DEBUG)) as four:
            assert train(tmp_path / "one", base=DEBUG) == 0
            assert four.wait() == 0, four.said
        assert_same_training(steps(tmp_path / "four"), steps(tmp_path / "one"))
        assert len(losses(tmp_path / "one")) == 2
        assert four.said.count("iteration        2/       2") == 1, "one rank alone speaks"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    assert train(folder, "--eval-interval", "2", "--save-interval", "2", "--keep-last", "2") == 0
    return folder


class TestFiles:
    KEYS = (
        *("iteration", "consumed_samples", "consumed_tokens", "lm_loss", "learning_rate", "grad_norm", "loss_scale"),
        *("iteration_time_ms", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes"),
        *("communication_bytes", "communication_calls", "skipped_iterations"),
    )

    def test_metrics(self, done):
        records = read_records(done / "metrics.jsonl")
        order = [(r["iteration"], "validation_loss" in r) for r in records]
        assert order == [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True),
                         (5, False), (6, False), (6, True)]  # fmt: skip
        for record in records:
            if "lm_loss" in record:
                assert tuple(record) == self.KEYS
                assert record["consumed_samples"] == 8 * record["iteration"]
                assert record["consumed_tokens"] == 16 * record["consumed_samples"]
                assert all(math.isfinite(record[key]) for key in self.KEYS if not key.startswith("communication"))
                assert record["communication_bytes"] == record["communication_calls"] == {}  # one process
            else:
                assert tuple(record) == ("iteration", "consumed_samples", "validation_loss")
        assert losses(done)[-1] < losses(done)[0]

    def test_checkpoints_are_kept_as_asked(self, done):
        assert checkpoints(done) == [4, 6]
        assert (done / "checkpoints" / "latest").read_text() == "step_00000006\n"

    def test_config_yaml_is_a_recipe_of_the_same_run(self, done, tmp_path):
        text = (done / "config.yaml").read_text()
        assert "num_layers: 2  # flag --num-layers" in text
        assert "norm_epsilon: 1.0e-05  # default" in text or "norm_epsilon: 1e-05  # default" in text
        assert "# kv_channels: 8  # derived: " in text
        assert train_argv(["--recipe", str(done / "config.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
        assert reproducible(tmp_path / "again") == reproducible(done)
        assert checkpoints(tmp_path / "again") == [4, 6], "written to its own folder"

    def test_the_same_command_twice_gives_the_same_bits(self, done, tmp_path):
        assert train(tmp_path, "--eval-interval", "2", "--save-interval", "2") == 0
        assert reproducible(tmp_path) == reproducible(done)
        assert tensors(tmp_path, 6) == tensors(done, 6)


class TestEnds:
    def test_exit_interval(self, tmp_path, capsys):
        assert train(tmp_path, "--exit-interval", "4") == 0
        assert "stopped after iteration 4 of 6 (--exit-interval 4); checkpoint saved in" in capsys.readouterr().out
        assert checkpoints(tmp_path) == [4]
        assert train(tmp_path, "--exit-interval", "4") == 0
        assert [record["iteration"] for record in steps(tmp_path)] == [1, 2, 3, 4, 5, 6]

    def test_exit_duration(self, tmp_path, capsys):
        assert train(tmp_path, "--exit-duration-in-mins", "0.005", "--train-iters", "100000") == 0
        said = capsys.readouterr().out
        reached = checkpoints(tmp_path)
        assert f"stopped after iteration {reached[0]} of 100000 (--exit-duration-in-mins 0.005)" in said
        assert 1 <= reached[0] < 100, "0.3 seconds of steps"
        assert steps(tmp_path)[-1]["iteration"] == reached[0]

    def test_exit_interval_on_two_ranks(self, ranks, tmp_path):
        argv = command(tmp_path, "--exit-interval", "2")
        (status, said), (_, other) = ranks.run(train_on_rank, 2, argv, group=False)
        assert status == 0
        assert said.count("stopped after iteration 2 of 6 (--exit-interval 2)") == 1
        assert "stopped" not in other


class TestNonFinite:
    """A learning rate that throws the weights out of range in the first step."""

    WILD = ("--lr", "1e38", "--clip-grad", "0", "--lr-decay-style", "constant", "--train-iters", "3")

    def test_skip(self, tmp_path, capsys):
        assert train(tmp_path, *self.WILD) == 0
        assert "iteration 2 skipped: non-finite loss or gradient" in capsys.readouterr().out
        assert [record["skipped_iterations"] for record in steps(tmp_path)] == [0, 1, 2]
        assert losses(tmp_path)[1:] == [None, None]

    def test_skip_leaves_the_weights_alone(self, tmp_path):
        assert train(tmp_path, *self.WILD, "--save-interval", "1") == 0
        assert tensors(tmp_path, 2) == tensors(tmp_path, 3)

    def test_raise_names_parameter_and_rank(self, ranks, tmp_path):
        argv = command(tmp_path, *self.WILD, "--non-finite", "raise")
        for rank, (status, said) in enumerate(ranks.run(train_on_rank, 2, argv, group=False)):
            assert status == 1
            assert f"[rank {rank}] error: non-finite loss or gradient" in said
            assert "rank 0: " in said
            assert "rank 1: " in said
            assert "Lower the learning rate" in said
        assert not (tmp_path / "checkpoints").exists()


class TestSwitches:
    def test_dropout_is_the_same_on_every_layout(self, ranks, tmp_path):
        flags = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
        assert train(tmp_path / "one", *flags) == 0
        assert train(tmp_path / "none") == 0
        for world, more in ((2, TP2), (2, ())):
            folder = tmp_path / "_".join(more)
            argv = command(folder, *flags, *more)
            for status, said in ranks.run(train_on_rank, world, argv, group=False):
                assert status == 0, said
            assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert losses(tmp_path / "one")[0] != pytest.approx(losses(tmp_path / "none")[0], rel=1e-5)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_grad_reduce_in_bf16_and_no_overlap_run(self, ranks, tmp_path, precision):
        flags = ("--precision", precision, "--grad-reduce-in-bf16", "--no-overlap-grad-reduce")
        argv = command(tmp_path, *flags, "--no-overlap-param-gather", "--ddp-bucket-size", "2000")
        for status, said in ranks.run(train_on_rank, 2, argv, group=False):
            assert status == 0, said
        assert losses(tmp_path)[-1] < losses(tmp_path)[0]

    @pytest.mark.slow
    def test_compiled_equals_eager(self, tmp_path):
        assert train(tmp_path / "eager", "--train-iters", "2") == 0
        assert train(tmp_path / "compiled", "--train-iters", "2", "--compile") == 0
        assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)

    def test_train_samples(self, tmp_path):
        iters = [*MOCK[: MOCK.index("--train-iters")], *MOCK[MOCK.index("--train-iters") + 2 :]]
        assert train_argv([*iters, "--train-samples", "24", "--output-dir", str(tmp_path)]) == 0
        assert [record["consumed_samples"] for record in steps(tmp_path)] == [8, 16, 24]
