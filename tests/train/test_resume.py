"""Going on from a checkpoint: bit for bit on the same layout, the same numbers on another, longer, and elsewhere."""

from __future__ import annotations

import json

import pytest

from megazero.train.records import read_records
from tests.train.command import (
    MOCK,
    checkpoints,
    command,
    everything_under,
    losses,
    reproducible,
    steps,
    tensors,
    train,
    train_on_rank,
)

TP2 = ("--tensor-model-parallel-size", "2")
WSD = ("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "2", "--lr-warmup-iters", "1")
CONSTANT = ("--lr-decay-style", "constant")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps without a stop, with checkpoints after 3 and 6, on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, "--save-interval", "3") == 0
    return folder


class TestBitwise:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize(("world", "layout"), [(1, ()), (2, ()), (2, ("--zero-stage", "0")), (2, TP2), (4, TP2)])
    def test_stopped_and_resumed_is_the_same_run(self, ranks, tmp_path, precision, world, layout):
        flags = ("--precision", precision, "--hidden-dropout", "0.1", "--save-interval", "3", "--eval-interval", "2")
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        once = command(whole, *flags, *layout)
        stopped = command(parts, *flags, *layout, "--exit-interval", "3")
        for argv in (once, stopped, stopped):
            results = ranks.run(train_on_rank, world, argv, group=False)
            assert [status for status, _ in results] == [0] * world, results
        said = results[0][1]
        assert f"resuming from {parts}/checkpoints, iteration 3" in said
        assert [r["iteration"] for r in reproducible(parts)] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
        assert reproducible(parts) == reproducible(whole)
        assert tensors(parts, 6) == tensors(whole, 6)
        assert tensors(parts, 3) == tensors(whole, 3)
        assert tensors(parts, 3) != tensors(whole, 6)

    def test_killed_after_its_checkpoint_lines_are_not_doubled(self, tmp_path, whole):
        """What a kill leaves: lines, and half a line, of steps that the last checkpoint does not have."""
        assert train(tmp_path, "--save-interval", "3", "--exit-interval", "3") == 0
        lost = {**steps(tmp_path)[-1], "iteration": 4, "lm_loss": 99.0}
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(lost) + "\n" + json.dumps(lost)[:40])
        assert train(tmp_path, "--save-interval", "3") == 0
        assert reproducible(tmp_path) == reproducible(whole)


LAYOUTS = {
    "one": (1, ()),
    "dp2": (2, ()),
    "dp2, zero 0": (2, ("--zero-stage", "0")),
    "tp2": (2, TP2),
    "tp2 dp2": (4, TP2),
    "tp4": (4, ("--tensor-model-parallel-size", "4")),
}


class TestOtherLayouts:
    @pytest.mark.parametrize("first", ["one", "tp2 dp2", "dp2, zero 0"])
    def test_any_layout_goes_on_where_another_stopped(self, ranks, tmp_path, whole, first):
        world, flags = LAYOUTS[first]
        start = command(tmp_path / "first", *flags, "--exit-interval", "3")
        for status, said in ranks.run(train_on_rank, world, start, group=False):
            assert status == 0, said
        before = everything_under(tmp_path / "first")
        for name, (size, more) in LAYOUTS.items():
            folder = tmp_path / name.replace(" ", "")
            argv = command(folder, *more, "--load", str(tmp_path / "first" / "checkpoints"))
            for status, said in ranks.run(train_on_rank, size, argv, group=False):
                assert status == 0, said
            assert losses(folder) == pytest.approx(losses(whole)[3:], rel=1e-5), name
        assert everything_under(tmp_path / "first") == before, "--load only reads"


class TestCompleteAndLonger:
    def test_a_complete_run_says_how_to_go_on_and_loses_nothing(self, tmp_path, capsys):
        assert train(tmp_path) == 0
        before = everything_under(tmp_path)
        capsys.readouterr()
        assert train(tmp_path) == 0
        said = capsys.readouterr().out
        assert f"{tmp_path} is complete: its checkpoint is at iteration 6 and --train-iters is 6" in said
        assert "the same command with a higher --train-iters resumes there" in said
        assert "another --output-dir" in said
        assert everything_under(tmp_path) == before

    def test_wsd_is_made_longer_before_its_decay(self, tmp_path, capsys):
        """Stopped in the stable phase and made longer: the same as having asked for the longer run at once."""
        assert train(tmp_path / "long", *WSD, "--train-iters", "8") == 0
        assert train(tmp_path / "grown", *WSD, "--exit-interval", "3") == 0
        capsys.readouterr()
        assert train(tmp_path / "grown", *WSD, "--train-iters", "8") == 0
        assert "warning" not in capsys.readouterr().err
        assert reproducible(tmp_path / "grown") == reproducible(tmp_path / "long")
        rates = [record["learning_rate"] for record in steps(tmp_path / "grown")]
        assert rates[1:7] == [1e-2] * 6
        assert rates[7] < 1e-2

    def test_a_finished_wsd_goes_on_from_before_its_decay(self, tmp_path, capsys):
        """Just what the warning says: from its own checkpoint before the decay."""
        assert train(tmp_path / "long", *WSD, "--train-iters", "8") == 0
        assert train(tmp_path / "run", *WSD, "--save-interval", "4") == 0
        assert checkpoints(tmp_path / "run") == [4, 6]
        capsys.readouterr()
        assert train(tmp_path / "run", *WSD, "--train-iters", "7") == 0
        assert "resume from a checkpoint before it began: --ckpt-step 4 or less" in capsys.readouterr().err
        assert train(tmp_path / "run", *WSD, "--ckpt-step", "4", "--train-iters", "8") == 0
        assert losses(tmp_path / "run") == losses(tmp_path / "long")

    def test_a_finished_cosine_runs_on_at_min_lr_with_a_warning(self, tmp_path, capsys):
        assert train(tmp_path, "--min-lr", "1e-3") == 0
        capsys.readouterr()
        assert train(tmp_path, "--min-lr", "1e-3", "--train-iters", "8") == 0
        said = capsys.readouterr()
        assert "learning-rate decay ends at iteration 6; iterations 7 to 8 run at 0.001 (min-lr)" in said.err
        assert "--override-opt-param-scheduler" in said.err
        assert "resuming from" in said.out
        assert [r["learning_rate"] for r in steps(tmp_path)][6:] == [pytest.approx(1e-3)] * 2
        assert [r["iteration"] for r in steps(tmp_path)] == list(range(1, 9))

    def test_override_stretches_the_decay(self, tmp_path, capsys):
        assert train(tmp_path) == 0
        assert train(tmp_path, "--train-iters", "12", "--override-opt-param-scheduler") == 0
        assert "warning" not in capsys.readouterr().err
        assert steps(tmp_path)[6]["learning_rate"] == pytest.approx(5e-3), "half-way of a cosine over 12"

    def test_another_course_is_refused_without_override(self, tmp_path, capsys):
        assert train(tmp_path) == 0
        before = everything_under(tmp_path)
        assert train(tmp_path, "--train-iters", "8", "--lr", "2e-2") == 2
        said = capsys.readouterr().err
        assert "--lr 0.02, but the checkpoint's run has --lr 0.01" in said
        assert "--override-opt-param-scheduler" in said
        assert everything_under(tmp_path) == before

    def test_a_longer_constant_run_equals_one_that_was_long_from_the_start(self, tmp_path):
        assert train(tmp_path / "long", *CONSTANT, "--train-iters", "8") == 0
        assert train(tmp_path / "grown", *CONSTANT) == 0
        assert train(tmp_path / "grown", *CONSTANT, "--train-iters", "8") == 0
        assert losses(tmp_path / "grown") == losses(tmp_path / "long")
        assert tensors(tmp_path / "grown", 8) == tensors(tmp_path / "long", 8)


class TestLoad:
    def test_finetune_takes_the_weights_alone(self, tmp_path, whole, capsys):
        load = ("--load", str(whole / "checkpoints"))
        assert train(tmp_path / "tuned", *load, "--finetune", "--seed", "7", "--eval-interval", "1") == 0
        said = capsys.readouterr().out
        assert f"taking the weights of {whole}/checkpoints, iteration 6" in said
        assert [r["iteration"] for r in steps(tmp_path / "tuned")] == [1, 2, 3, 4, 5, 6]
        assert steps(tmp_path / "tuned")[0]["consumed_samples"] == 8
        assert steps(tmp_path / "tuned")[0]["learning_rate"] == steps(whole)[0]["learning_rate"]

    def test_finetune_begins_with_exactly_those_weights(self, tmp_path, whole):
        """Its first validation is the other run's last: the same samples and the same weights."""
        assert train(tmp_path, "--load", str(whole / "checkpoints"), "--finetune", "--exit-interval", "1") == 0
        last = [r for r in read_records(whole / "metrics.jsonl") if "validation_loss" in r][-1]
        assert read_records(tmp_path / "metrics.jsonl")[0]["validation_loss"] == last["validation_loss"]

    def test_a_finetuned_run_resumes_itself(self, tmp_path, whole, capsys):
        flags = ("--load", str(whole / "checkpoints"), "--finetune")
        assert train(tmp_path / "whole", *flags) == 0
        assert train(tmp_path / "parts", *flags, "--exit-interval", "3") == 0
        capsys.readouterr()
        assert train(tmp_path / "parts", *flags) == 0
        said = capsys.readouterr().out
        assert f"this run has a checkpoint of its own, so --load {whole}/checkpoints is not used again" in said
        assert reproducible(tmp_path / "parts") == reproducible(tmp_path / "whole")

    def test_the_same_command_with_ckpt_step_resumes_itself(self, tmp_path, whole):
        """--ckpt-step chooses among the checkpoints of --load, not among the run's own."""
        flags = ("--load", str(whole / "checkpoints"), "--ckpt-step", "3")
        assert train(tmp_path, *flags, "--exit-interval", "4") == 0
        assert [r["iteration"] for r in steps(tmp_path)] == [4]
        assert train(tmp_path, *flags) == 0
        assert [r["iteration"] for r in steps(tmp_path)] == [4, 5, 6]
        assert losses(tmp_path) == losses(whole)[3:]

    def test_ckpt_step_and_its_own_folder_under_another_spelling_go_back(self, tmp_path, whole):
        assert train(tmp_path, "--save-interval", "3") == 0
        own = f"{tmp_path}/../{tmp_path.name}/checkpoints/"
        assert train(tmp_path, "--load", own, "--ckpt-step", "3", "--exit-interval", "4") == 0
        assert reproducible(tmp_path) == [record for record in reproducible(whole) if record["iteration"] <= 4]

    def test_load_of_a_run_elsewhere_goes_on_with_its_order(self, tmp_path, whole):
        assert train(tmp_path, "--load", str(whole / "checkpoints"), "--ckpt-step", "3") == 0
        assert losses(tmp_path) == losses(whole)[3:]
        assert tensors(tmp_path, 6) == tensors(whole, 6)

    @pytest.mark.parametrize(
        ("flag", "value", "was"),
        [("--seed", "7", "1234"), ("--seq-length", "8", "16"), ("--split", "90,10,0", "969,30,1")],
    )
    def test_another_data_order_is_refused(self, tmp_path, capsys, flag, value, was):
        assert train(tmp_path, "--exit-interval", "3") == 0
        before = everything_under(tmp_path)
        assert train(tmp_path, flag, value) == 2
        said = capsys.readouterr().err
        assert "the order of the data would change in mid-run" in said
        assert f"Give {flag} {was}" in said
        assert "--finetune" in said
        assert everything_under(tmp_path) == before

    def test_another_optimizer_is_refused(self, tmp_path, capsys):
        assert train(tmp_path, "--exit-interval", "3") == 0
        before = everything_under(tmp_path)
        assert train(tmp_path, "--optimizer", "sgd") == 2
        assert "--optimizer sgd, but" in capsys.readouterr().err
        assert everything_under(tmp_path) == before

    def test_sgd_resumes_bitwise(self, tmp_path):
        flags = ("--optimizer", "sgd", "--lr", "0.1")
        assert train(tmp_path / "whole", *flags) == 0
        assert train(tmp_path / "parts", *flags, "--exit-interval", "3") == 0
        assert train(tmp_path / "parts", *flags) == 0
        assert reproducible(tmp_path / "parts") == reproducible(tmp_path / "whole")
        assert tensors(tmp_path / "parts", 6) == tensors(tmp_path / "whole", 6)


def test_a_new_run_in_a_used_folder_keeps_the_old_metrics(tmp_path):
    """No checkpoint yet, so it starts afresh; the earlier attempt's numbers are set aside."""
    assert train(tmp_path, "--save", str(tmp_path / "a")) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(tmp_path, "--save", str(tmp_path / "b"), "--train-iters", "3") == 0
    assert (tmp_path / "metrics.jsonl.old").read_bytes() == before
    assert len(losses(tmp_path)) == 3
    assert MOCK[-1] == "--mock-data"
