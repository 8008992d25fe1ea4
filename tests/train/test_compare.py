"""tools/compare_runs.py: runs on different layouts are equal, and what differs is named with the first iteration."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megazero.engine.checkpoint import save
from megazero.train.compare import Point
from megazero.train.compare_weights import difference
from tests.engine.checkpoint_pieces import single, whole_pieces
from tests.harness import ROOT, Ranks
from tests.train.command import command, steps, train, train_on_rank
from tests.train.records import step, validation
from tools.compare_runs import main

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert train(folder, "--save-interval", "3") == 0
    return folder


class TestRuns:
    @pytest.mark.parametrize(
        ("world", "flags"),
        [(2, TP2), (2, ()), (2, ("--zero-stage", "0")), (4, TP2), (2, PP2), (2, CP2)],
        ids=["tp2", "dp2", "dp2 zero0", "tp2 dp2", "pp2", "cp2"],
    )
    def test_layouts_are_equal(
        self, ranks: Ranks, tmp_path: Path, alone: Path, capsys: Any, world: int, flags: Sequence[str]
    ) -> None:
        results = ranks.run(train_on_rank, world, command(tmp_path, *flags, "--save-interval", "3"), group=False)
        assert [status for status, _ in results] == [0] * world, results
        assert main([str(alone), str(tmp_path), "--weights"]) == 0
        assert main([str(alone), str(tmp_path), "--weights", "--iteration", "3"]) == 0
        sent, calls = (steps(tmp_path)[-1][f"communication_{what}"] for what in ("bytes", "calls"))
        assert sent.keys() == calls.keys() >= {"world"}
        assert "  communication    sent by rank 0 in a step, by axis and operation\n" in results[0][1]
        assert steps(alone)[-1]["communication_bytes"] == {}
        said = capsys.readouterr().out
        assert "weights at iteration 6, 21 tensors" in said
        assert "weights at iteration 3, 21 tensors" in said
        assert ("parallel.tensor_model_parallel_size: 1 | 2" in said) == (flags == TP2)
        assert "other settings" not in said
        assert said.endswith("equal within the tolerances\n")

    def test_another_learning_rate_is_seen(self, tmp_path: Path, alone: Path, capsys: Any) -> None:
        assert train(tmp_path, "--lr", "1.01e-2") == 0
        assert main([str(alone), str(tmp_path), "--weights"]) == 1
        said = capsys.readouterr().out
        assert "at iteration 2\n" in said  # the first step is the same, and changes the weights differently
        assert "other settings, which may be why (a | b):\n  optimizer.lr: 0.01 | 0.0101\n" in said
        assert "21 tensors: 0 equal" in said
        assert said.endswith("DIFFERENT\n")
        assert main([str(alone), str(tmp_path), "--rtol", "1", "--grad-norm-rtol", "1"]) == 0
        assert main([str(alone), str(tmp_path), "--weights", "--rtol", "1", "--grad-norm-rtol", "1"]) == 1


def run_at(folder: Path, losses: Sequence[float], weights: dict[str, Tensor] | None = None, lr: str = "0.1") -> Path:
    """A run's folder: a training line an iteration with these losses, a validation, settings, a checkpoint."""
    folder.mkdir()
    records: list[Any] = [validation(0, 9.0), *(step(i, lm_loss=loss) for i, loss in enumerate(losses, start=1))]
    lines = [{k: None if v != v else v for k, v in record.items()} for record in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tp = "parallel:\n  tensor_model_parallel_size: 1  # default\n"
    settings = f"optimizer:\n  lr: {lr}  # flag --lr\nlogging:\n  # output_dir: {folder}  # derived: x\n"
    (folder / "config.yaml").write_text(tp + settings)
    if weights is not None:
        save(folder / "checkpoints", len(losses), {"weights": whole_pieces(weights)}, {}, "", single())
    return folder


EXPECTED = """\
a: {a}
b: {b}
lm_loss, 3 iterations: largest deviation 1.00e-01 at iteration 3, beyond the tolerance 1e-05
  first difference   1.00e-06: 3 | 3.000003 at iteration 2
  first beyond it    1.00e-01: 2 | 1.8 at iteration 3
grad_norm, 3 iterations: equal
validation_loss, 1 iteration: equal
other settings, which may be why (a | b):
  optimizer.lr: 0.1 | 0.2
weights at iteration 3, 3 tensors: 1 equal, 1 beyond the tolerance 2e-05 (absolute)
  max |a - b|   relative   tensor
     5.00e-01   1.64e-01   up
  … and 1 closer ones (--top 2 shows them)
  only in a: extra
  shapes differ: head [2, 2] | [4]
DIFFERENT
"""


def test_the_whole_output(tmp_path: Path, capsys: Any) -> None:
    common = {"norm": torch.ones(3), "bias": torch.ones(2)}
    of_a = {"up": torch.tensor([3.0, 0.0]), "extra": torch.ones(1), "head": torch.ones(2, 2)}
    of_b = {"up": torch.tensor([3.0, 0.5]), "head": torch.ones(4), "bias": torch.ones(2) + 2**-17}
    a = run_at(tmp_path / "a", [4.0, 3.0, 2.0], common | of_a)
    b = run_at(tmp_path / "b", [4.0, 3.000003, 1.8], common | of_b, lr="0.2")
    assert main([str(a), str(b), "--weights", "--top", "1"]) == 1
    said = capsys.readouterr()
    assert said.out == EXPECTED.format(a=a, b=b)  # ‖(0, 0.5)‖ / ‖(3, 0.5)‖ = 0.164
    assert said.err == ""


def test_weights_may_make_the_difference(tmp_path: Path) -> None:
    a = run_at(tmp_path / "a", [4.0], {"up": torch.ones(2)})
    b = run_at(tmp_path / "b", [4.0], {"up": torch.ones(2) + 1e-4})
    assert main([str(a), str(b)]) == 0
    assert main([str(a), str(b), "--weights"]) == 1
    assert main([str(a), str(b), "--weights", "--weight-atol", "1e-3"]) == 0


def test_a_run_that_went_further_is_compared_as_far_as_both_go(tmp_path: Path, capsys: Any) -> None:
    a, b = run_at(tmp_path / "a", [4.0, 3.0]), run_at(tmp_path / "b", [4.0, 3.0, 2.0])
    assert main([str(a), str(b)]) == 0
    assert "only b has 1 more training line\n" in capsys.readouterr().out


def test_numbers_that_are_not_finite(tmp_path: Path, capsys: Any) -> None:
    a, b = run_at(tmp_path / "a", [4.0, math.nan]), run_at(tmp_path / "b", [4.0, 3.0])
    assert main([str(a), str(a)]) == 0
    assert main([str(a), str(b)]) == 1
    assert "first difference   inf: not finite | 3 at iteration 2" in capsys.readouterr().out
    assert Point(1, None, None).deviation == 0.0
    assert Point(1, 0.0, 1e-30).deviation == 1.0


def test_differences_of_tensors() -> None:
    nan, inf = math.nan, math.inf
    assert difference(torch.tensor([1.0, nan, inf]), torch.tensor([1.0, nan, inf])) == (0.0, 0.0)
    assert difference(torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0])) == (inf, inf)
    assert difference(torch.tensor([1.0, inf]), torch.tensor([1.0, -inf])) == (inf, inf)
    assert difference(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])) == (4.0, 1.0)
    assert difference(torch.tensor(2.0), torch.tensor(1.0)) == (1.0, 0.5)
    assert difference(torch.zeros(0), torch.zeros(0)) == (0.0, 0.0)
    big = torch.zeros((1 << 22) + 5)  # two chunks
    other = big.clone()
    other[3], other[-1] = 3.0, -4.0
    assert difference(big, other) == (4.0, 1.0)


class TestBadInput:
    """Exit status 2, and one message."""

    @pytest.fixture
    def runs(self, tmp_path: Path) -> tuple[Path, Path]:
        weights = {"up": torch.ones(2)}
        return run_at(tmp_path / "a", [4.0, 3.0], weights), run_at(tmp_path / "b", [4.0, 3.0], weights)

    def refused(self, capsys: Any, a: Path, b: Path, *flags: str) -> str:
        assert main([str(a), str(b), *flags]) == 2
        message: str = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    def test_no_such_run(self, runs: Any, capsys: Any, tmp_path: Path) -> None:
        message = self.refused(capsys, runs[0], tmp_path / "c")
        assert "c/metrics.jsonl cannot be read (No such file or directory): give the --output-dir of a run" in message

    def test_damaged_metrics(self, runs: Any, capsys: Any) -> None:
        file = runs[1] / "metrics.jsonl"
        file.write_text("{half\n" + file.read_text())
        assert "b/metrics.jsonl, line 1, is not a metrics record" in self.refused(capsys, *runs)

    def test_nothing_in_common(self, runs: Any, capsys: Any) -> None:
        (runs[1] / "metrics.jsonl").write_text(json.dumps(step(10)) + "\n")
        message = self.refused(capsys, *runs)
        assert "have no training iteration in common: 1 to 2 and 10 to 10. Compare runs of the same recipe" in message
        (runs[1] / "metrics.jsonl").write_text("")
        assert "in common: 1 to 2 and none" in self.refused(capsys, *runs)

    def test_damaged_settings(self, runs: Any, capsys: Any) -> None:
        (runs[1] / "config.yaml").write_text("- 1\n")
        assert "b/config.yaml is not the config.yaml of a run" in self.refused(capsys, *runs)

    def test_no_settings_is_no_error(self, runs: Any) -> None:
        (runs[1] / "config.yaml").unlink()
        assert main([*map(str, runs), "--weights"]) == 0

    def test_no_common_checkpoint(self, runs: Any, capsys: Any) -> None:
        (runs[1] / "checkpoints").rename(runs[1] / "elsewhere")
        message = self.refused(capsys, *runs, "--weights")
        assert "no iteration has a checkpoint in both runs: " in message
        assert f"{runs[0]}/checkpoints holds 2 and {runs[1]}/checkpoints holds none" in message
        assert "or leave out --weights" in message

    def test_checkpoints_elsewhere_are_found_by_the_settings(self, runs: Any) -> None:
        (runs[1] / "checkpoints").rename(runs[1] / "elsewhere")
        with (runs[1] / "config.yaml").open("a") as file:
            file.write(f"checkpoint:\n  save: {runs[1]}/elsewhere  # flag --save\n")
        assert main([*map(str, runs), "--weights"]) == 0

    def test_no_such_iteration(self, runs: Any, capsys: Any) -> None:
        message = self.refused(capsys, *runs, "--weights", "--iteration", "7")
        assert "a/checkpoints holds no whole checkpoint of iteration 7. Usable steps here: 2" in message

    def test_damaged_checkpoint(self, runs: Any, capsys: Any) -> None:
        (payload,) = (runs[1] / "checkpoints").rglob("*.safetensors")
        data = bytearray(payload.read_bytes())
        data[-1] ^= 1
        payload.write_bytes(data)
        assert "is damaged: its sha256" in self.refused(capsys, *runs, "--weights")

    def test_iteration_without_weights(self, runs: Any, capsys: Any) -> None:
        with pytest.raises(SystemExit) as leaving:
            main([*map(str, runs), "--iteration", "2"])
        assert leaving.value.code == 2
        assert "--iteration chooses the checkpoints: give --weights too" in capsys.readouterr().err


def test_from_the_command_line_and_without_torch(tmp_path: Path) -> None:
    a, b = run_at(tmp_path / "a", [4.0]), run_at(tmp_path / "b", [5.0])
    tool = [sys.executable, str(ROOT / "tools" / "compare_runs.py")]
    assert subprocess.run([*tool, str(a), str(b)], cwd=tmp_path, capture_output=True, timeout=60).returncode == 1
    code = "import sys; from tools.compare_runs import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(a), str(b)], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
