"""TensorBoard and Weights & Biases get the records, and whatever goes wrong in them costs a warning only."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from megazero.base import optional
from megazero.base.log import Log
from megazero.train import trackers as module
from megazero.train.metrics import Metrics
from megazero.train.trackers import Trackers
from tests.train.records import config, step, validation

SENT = {  # the nested numbers of a record, as trackers take them
    "communication_bytes/tp/all-reduce": 2_097_152,
    "communication_bytes/zero/padding": 96,
    "communication_bytes/zero/reduce-scatter": 4096,
    "communication_calls/tp/all-reduce": 8,
    "communication_calls/zero/reduce-scatter": 2,
}
FAKE_WANDB = '''
"""Stands in for wandb: records what it is told; `refuse` lists the modes in which init fails."""
calls, runs, refuse = [], [], []


class Settings(dict):
    pass


def init(**arguments):
    if arguments["id"] in [call["id"] for call in calls if "failed" in call]:
        raise RuntimeError("run ID is in use")  # as wandb 0.31 does
    calls.append(arguments)
    if arguments.get("mode", "online") in refuse:
        arguments["failed"] = True
        raise TimeoutError("no server in reach")
    runs.append(Run())
    return runs[-1]


class Run:
    def __init__(self):
        self.logged, self.defined, self.finished, self.fail = [], [], False, False

    def define_metric(self, *names, step_metric):
        self.defined.append((names, step_metric))

    def log(self, values):
        if self.fail:
            raise ConnectionError("gone")
        self.logged.append(values)

    def finish(self):
        self.finished = True
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package named wandb that the code under test imports, fresh for each test."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def without(monkeypatch, package: str) -> None:
    found = optional._found
    monkeypatch.setattr(optional, "_found", lambda name: name.partition(".")[0] != package and found(name))


def one_warning(capsys) -> str:
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


def test_nothing_is_opened_unless_asked(tmp_path, capsys):
    trackers = Trackers(config(tmp_path), Log(), resumed_at=0)
    trackers.log(step(1))
    trackers.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_every_number_and_forgets_what_a_resumed_run_redoes(tmp_path):
    asked = config(tmp_path / "run", tensorboard_dir=str(tmp_path / "events"))
    first = Trackers(asked, Log(), resumed_at=0)
    for record in (validation(0, 9.0), step(1, lm_loss=4.0, mfu=None), step(2, lm_loss=99.0)):
        first.log(record)
    first.close()
    second = Trackers(asked, Log(), resumed_at=1)
    second.log(step(2, lm_loss=3.0))
    second.close()
    values = scalars(tmp_path / "events")
    assert values["lm_loss"] == [(1, 4.0), (2, 3.0)]
    assert values["validation_loss"] == [(0, 9.0)]
    nested = {"communication_bytes", "communication_calls"}
    assert values.keys() == ((step(1).keys() | validation(0).keys()) - {"iteration"} - nested) | SENT.keys()
    assert values["communication_calls/tp/all-reduce"] == [(1, 8.0), (2, 8.0)]
    assert values["mfu"] == [(2, 0.4)]


@pytest.mark.parametrize(("package", "logging"), [("tensorboard", "tensorboard_dir"), ("wandb", "wandb_project")])
def test_a_missing_package_costs_one_warning_with_the_pip_line(tmp_path, monkeypatch, capsys, package, logging):
    without(monkeypatch, package)
    trackers = Trackers(config(tmp_path, **{logging: str(tmp_path / "there")}), Log(), resumed_at=0)
    trackers.log(step(1))
    trackers.log(step(2))
    trackers.close()
    warning = one_warning(capsys)
    assert "off from here on, the run continues" in warning
    assert f"pip install {package}" in warning


def test_wandb_gets_the_settings_and_every_number(tmp_path, wandb):
    trackers = Trackers(config(tmp_path, wandb_project="p"), Log(), resumed_at=0)
    trackers.log(step(1, mfu=None))
    trackers.log(validation(1))
    trackers.close()
    (call,), (run,) = wandb.calls, wandb.runs
    assert (call["project"], call["name"], call["dir"]) == ("p", tmp_path.name, str(tmp_path))
    assert call["config"]["training"]["train_iters"] == 100
    assert "origins" not in call["config"]
    plain = {key: value for key, value in step(1).items() if key != "mfu" and not isinstance(value, dict)}
    expected: dict[str, Any] = plain | SENT
    assert run.logged == [expected, dict(validation(1))]
    assert run.defined == [(("*",), "iteration")]
    assert run.finished


def test_wandb_continues_its_run_when_the_run_resumes_and_only_then(tmp_path, wandb):
    for resumed_at in (0, 5, 0):
        Trackers(config(tmp_path, wandb_project="p", wandb_exp_name="mine"), Log(), resumed_at).close()
    fresh, resumed, again = (call["id"] for call in wandb.calls)
    assert fresh == resumed != again
    assert {call["name"] for call in wandb.calls} == {"mine"}
    assert {call["resume"] for call in wandb.calls} == {"allow"}


def test_wandb_goes_offline_with_one_warning(tmp_path, wandb, capsys):
    wandb.refuse.append("online")
    trackers = Trackers(config(tmp_path, wandb_project="p"), Log(), resumed_at=0)
    trackers.log(step(1))
    trackers.close()
    assert [call.get("mode") for call in wandb.calls] == [None, "offline"]
    assert len(wandb.runs[0].logged) == 1
    warning = one_warning(capsys)
    assert f"Weights & Biases is offline, upload later with `wandb sync {tmp_path}/wandb/offline-run-*`" in warning
    assert "TimeoutError: no server in reach" in warning


def test_wandb_that_cannot_even_go_offline_is_off(tmp_path, wandb, capsys):
    wandb.refuse += ["online", "offline"]
    trackers = Trackers(config(tmp_path, wandb_project="p"), Log(), resumed_at=0)
    trackers.log(step(1))
    trackers.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "Weights & Biases is off from here on, the run continues (TimeoutError: no server in reach)" in said[0]


def test_a_tracker_that_fails_in_mid_run_is_switched_off_and_the_others_go_on(tmp_path, wandb, capsys):
    logging = {"wandb_project": "p", "tensorboard_dir": str(tmp_path / "events")}
    with Metrics(config(tmp_path / "run", progress="rich", **logging), is_main=True) as metrics:
        metrics.step(step(1))
        wandb.runs[0].fail = True
        metrics.step(step(2))
        metrics.step(step(3))
    assert [values["iteration"] for values in wandb.runs[0].logged] == [1]
    assert [at for at, _ in scalars(tmp_path / "events")["lm_loss"]] == [1, 2, 3]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert "".join(capsys.readouterr()).count("Weights & Biases is off from here on") == 1


def test_a_tracker_that_fails_at_the_end_does_not_fail_the_run(tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setattr(module.WeightsAndBiases, "close", lambda self: 1 / 0)
    Trackers(config(tmp_path, wandb_project="p"), Log(), resumed_at=0).close()
    assert "Weights & Biases is off from here on, the run continues (ZeroDivisionError" in one_warning(capsys)
