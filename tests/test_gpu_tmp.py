"""The entry point on one GPU: fp32 gives the CPU's losses, bf16 stays near them, with and without torch.compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5


def losses(folder: Path, *flags: str, hide_gpu: bool = False) -> list[float]:
    """The loss of each step of a run of recipes/debug_cpu.yaml in one process."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT)) | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})
    command = [sys.executable, "pretrain_gpt.py", "--recipe", "recipes/debug_cpu.yaml", "--output-dir", str(folder)]
    command += ["--train-iters", str(STEPS), *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["lm_loss"] for line in lines if "lm_loss" in line]



@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--precision", "fp32"], 1e-4),
        (["--precision", "bf16"], 2e-2),
        (["--precision", "bf16", "--compile"], 2e-2),
    ],
    ids=["fp32", "bf16", "bf16-compiled"],
)
def test_losses_on_the_gpu_are_those_of_the_cpu(tmp_path: Path, flags: list[str], tolerance: float) -> None:
    wanted = losses(tmp_path / "cpu", "--precision", "fp32", hide_gpu=True)
    assert len(wanted) == STEPS
    assert losses(tmp_path / "gpu", *flags) == pytest.approx(wanted, rel=tolerance)
