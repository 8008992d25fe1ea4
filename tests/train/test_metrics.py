"""The path from the loop's numbers to metrics.jsonl, stdout, loss.png and the summary."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest

from megazero.base import optional
from megazero.base.errors import ConfigError, DataError
from megazero.train.metrics import Metrics, summary
from megazero.train.records import MetricsFile, read_records
from tests.train.records import config, step, validation

KEYS = [
    *("iteration", "consumed_samples", "consumed_tokens", "lm_loss", "learning_rate", "grad_norm", "loss_scale"),
    *("iteration_time_ms", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes", "communication_bytes"),
    *("communication_calls", "skipped_iterations"),
]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch, request):
    """Drawing costs half a second: only the tests of the picture do."""
    if request.cls is not TestPicture:
        monkeypatch.setattr("megazero.train.metrics.plot_losses", lambda *args, **kwargs: False)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_lines_have_exactly_the_promised_keys(tmp_path):
    with Metrics(config(tmp_path), is_main=True) as metrics:
        metrics.validation(validation(0))
        metrics.step(step(10))
    first, second = lines(tmp_path)
    assert list(first) == ["iteration", "consumed_samples", "validation_loss"]
    assert list(second) == KEYS
    assert second == step(10)


def test_each_line_is_on_disk_at_once(tmp_path):
    metrics = Metrics(config(tmp_path), is_main=True)
    metrics.step(step(1))
    assert len(lines(tmp_path)) == 1
    metrics.step(step(2))
    assert len(lines(tmp_path)) == 2
    metrics.close()
    metrics.close()


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    with Metrics(config(tmp_path / "run", tensorboard_dir=str(tmp_path / "tb")), is_main=False) as metrics:
        metrics.validation(validation(0))
        metrics.step(step(1))
        metrics.message("hello")
        metrics.finish(sample="def f():")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_record_with_another_key_is_a_bug(tmp_path):
    with Metrics(config(tmp_path), is_main=True) as metrics:
        with pytest.raises(AssertionError):
            metrics.step({**step(1), "loss": 1.0})
        with pytest.raises(AssertionError):
            metrics.validation({"iteration": 1})


def test_numbers_that_are_not_finite_become_null(tmp_path, capsys):
    with Metrics(config(tmp_path), is_main=True) as metrics:
        metrics.step(step(1, lm_loss=math.nan, grad_norm=math.inf, mfu=None))
    (line,) = lines(tmp_path)
    assert (line["lm_loss"], line["grad_norm"], line["mfu"]) == (None, None, None)
    assert "lm loss: NAN" in capsys.readouterr().out


def test_resuming_removes_what_came_after(tmp_path):
    with Metrics(config(tmp_path), is_main=True) as metrics:
        for i in range(1, 6):
            metrics.step(step(i))
            metrics.validation(validation(i))
    with Metrics(config(tmp_path), is_main=True, resumed_at=3) as metrics:
        metrics.step(step(4, lm_loss=1.5))
    assert [(r["iteration"], "lm_loss" in r) for r in lines(tmp_path)] == [
        (1, True),
        (1, False),
        (2, True),
        (2, False),
        (3, True),
        (3, False),
        (4, True),
    ]
    assert lines(tmp_path)[-1]["lm_loss"] == 1.5
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


@pytest.mark.parametrize("cut", [1, 5, 60, 290])
def test_a_last_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    with Metrics(config(tmp_path), is_main=True) as metrics:
        for i in range(1, 4):
            metrics.step(step(i))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + (json.dumps(step(4)) + "\n")[:cut])
    assert [r["iteration"] for r in read_records(path)] == [1, 2, 3]
    with Metrics(config(tmp_path), is_main=True, resumed_at=9) as metrics:
        metrics.step(step(10))
    assert [r["iteration"] for r in lines(tmp_path)] == [1, 2, 3, 10]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step(1)))
    with Metrics(config(tmp_path), is_main=True, resumed_at=1) as metrics:
        metrics.step(step(2))
    assert [r["iteration"] for r in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("damage", ["{half", "[1, 2]", '{"loss": 1}', '{"iteration": null}'])
def test_damage_before_the_last_line_is_an_error_and_changes_nothing(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    text = "\n".join([json.dumps(step(1)), damage, json.dumps(step(2))]) + "\n"
    path.write_text(text)
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2, is not a metrics record .*Repair or delete that line"):
        Metrics(config(tmp_path), is_main=True, resumed_at=2)
    assert path.read_text() == text


def test_a_fresh_run_moves_an_earlier_file_aside(tmp_path):
    for i in (1, 2):
        with Metrics(config(tmp_path), is_main=True) as metrics:
            metrics.step(step(i))
    assert [r["iteration"] for r in lines(tmp_path)] == [2]
    assert [r["iteration"] for r in read_records(tmp_path / "metrics.jsonl.old")] == [1]


def test_an_unwritable_output_dir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"metrics.jsonl cannot be written .*Give a writable folder with --output-dir"
    ):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", resumed_at=0)


MEGATRONS_LINE = re.compile(  # as scripts parse it
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration       10/     100 \| consumed samples:          320 \|"
    r" elapsed time per iteration \(ms\): 123\.4 \| throughput per GPU \(TFLOP/s/GPU\): 1\.2 \|"
    r" learning rate: 1\.000000E-03 \| global batch size:    32 \| lm loss: 6\.123456E\+00 \| loss scale: 1\.0 \|"
    r" grad norm: 1\.234 \| number of skipped iterations:   0 \| number of nan iterations:   0 \|"
)


def test_the_plain_lines_are_megatrons(tmp_path, capsys):
    with Metrics(config(tmp_path), is_main=True) as metrics:
        metrics.step(step(10))
        metrics.validation(validation(10, loss=2.0))
        metrics.validation(validation(20, loss=50.0))
    out = capsys.readouterr().out.splitlines()
    assert MEGATRONS_LINE.fullmatch(out[0])
    text = " validation loss at iteration 10 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert out[1:4] == ["-" * (len(text) + 1), text, "-" * (len(text) + 1)]
    assert "lm loss PPL: 4.851652E+08 |" in out[5]  # Megatron caps the exponent at 20


def test_skipped_iterations_are_stored_in_total_and_shown_by_interval(tmp_path, capsys):
    with Metrics(config(tmp_path), is_main=True) as metrics:
        metrics.step(step(10, skipped_iterations=2))
        metrics.step(step(20, skipped_iterations=5), nan_iterations=4)
    with Metrics(config(tmp_path), is_main=True, resumed_at=20) as metrics:
        metrics.step(step(30, skipped_iterations=6))
    shown = re.findall(r"skipped iterations: +(\d+) \| number of nan iterations: +(\d+)", capsys.readouterr().out)
    assert shown == [("2", "0"), ("3", "4"), ("1", "0")]
    assert [r["skipped_iterations"] for r in lines(tmp_path)] == [2, 5, 6]


def test_the_progress_display_shows_the_numbers_and_messages_above(tmp_path, capsys):
    with Metrics(config(tmp_path, progress="rich"), is_main=True, resumed_at=40) as metrics:
        metrics.message("checkpoint saved")
        metrics.step(step(50, lm_loss=2.5, skipped_iterations=1))
        metrics.validation(validation(50, loss=2.0))
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "checkpoint saved" in out
    assert "iteration 50: 1 iterations skipped, 0 with a NaN loss" in out
    assert "iteration 50: validation loss 2.0000, perplexity 7.39" in out
    assert "50/100" in out
    assert "loss 2.5000" in out
    assert sys.stdout.__class__.__name__ != "FileProxy"  # the terminal is given back


@pytest.mark.parametrize(("terminal", "plain"), [(True, False), (False, True)])
def test_auto_is_the_display_on_a_terminal_alone(tmp_path, capsys, monkeypatch, terminal, plain):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with Metrics(config(tmp_path, progress="auto"), is_main=True) as metrics:
        metrics.step(step(10))
    assert ("consumed samples:          320 |" in capsys.readouterr().out) is plain


def finished(folder, **changes):
    with Metrics(config(folder), is_main=True) as metrics:
        metrics.validation(validation(0, loss=9.0))
        for i, speed in ((10, 100.0), (20, 900.0), (30, 1000.0)):
            metrics.step(step(i, tokens_per_second=speed, lm_loss=3.0, **changes))
        metrics.validation(validation(30, loss=3.25))
    return summary(folder / "metrics.jsonl")


def test_the_summary(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "samples.txt").write_text("def f():")
    text = finished(tmp_path).text()
    assert text.splitlines() == [
        "30 iterations, 61,440 tokens",
        "  validation loss  9.0000 at iteration 0 -> 3.2500 at iteration 30 (-5.75 nats)",
        "  training loss    3.0000",
        "  speed            900 tokens/s, 1.2 TFLOP/s per device, MFU 40.0% (medians)",
        "  communication    sent by rank 0 in a step, by axis and operation",
        "    tp      all-reduce             2.000 MiB in 8 calls",
        "    zero    padding                0.000 MiB",
        "    zero    reduce-scatter         0.004 MiB in 2 calls",
        f"Where to look next, in {tmp_path}/:",
        "  samples.txt    what the trained model writes",
        "  metrics.jsonl  every number behind this, one JSON object a line",
        "  checkpoints    weights and optimizer: the same command with a higher --train-iters goes on from here",
    ]


def test_the_summary_leaves_out_what_was_not_measured(tmp_path):
    assert "MFU" not in finished(tmp_path, mfu=None).text()
    with Metrics(config(tmp_path / "empty"), is_main=True) as metrics:
        metrics.message("nothing trained")
    assert summary(tmp_path / "empty" / "metrics.jsonl").text().splitlines()[0] == "0 iterations, 0 tokens"


def test_finish_closes_and_says_the_summary_and_the_sample(tmp_path, capsys):
    with Metrics(config(tmp_path), is_main=True) as metrics:
        metrics.validation(validation(0, loss=9.0))
        metrics.finish(sample="def f():\n    return 1")
    out = capsys.readouterr().out
    assert "validation loss  9.0000 at iteration 0\n" in out
    assert "What the model writes:\n\ndef f():\n    return 1\n" in out


class TestPicture:
    """loss.png."""

    def test_closing_draws_it(self, tmp_path):
        finished(tmp_path)
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert "loss.png" in summary(tmp_path / "metrics.jsonl").text()

    def test_gaps_and_missing_curves_are_no_problem(self, tmp_path):
        with Metrics(config(tmp_path), is_main=True) as metrics:
            metrics.step(step(1, lm_loss=math.nan))
            metrics.step(step(2))
        assert (tmp_path / "loss.png").exists()

    def test_nothing_to_draw_draws_nothing(self, tmp_path):
        with Metrics(config(tmp_path), is_main=True):
            pass
        assert not (tmp_path / "loss.png").exists()

    def test_without_matplotlib_there_is_one_warning_and_no_picture(self, tmp_path, capsys, monkeypatch):
        found = optional._found
        monkeypatch.setattr(optional, "_found", lambda module: "matplotlib" not in module and found(module))
        finished(tmp_path)
        assert not (tmp_path / "loss.png").exists()
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith("warning: ")
        assert warning.endswith("it is needed to draw loss.png. Install it: pip install matplotlib")
