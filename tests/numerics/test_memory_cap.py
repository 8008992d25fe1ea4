"""A model whose training state exceeds a process's memory trains under stage 3 with NVMe, and fails without.

`benchmarks/memory_cap.py` does it and says what it found.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.numerics.table import Record, record_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_more_state_than_memory(tmp_path: Path, record_property: Record) -> None:
    command = [sys.executable, "benchmarks/memory_cap.py", "--blocks", "64", "--steps", "2", "--cap", "720"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    for line in done.stdout.splitlines():
        record_line(record_property, "a cap on each process's memory", line[:160])
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "files are left"


def test_what_fails_is_told(tmp_path: Path) -> None:
    """A cap that nothing fits under: the benchmark does not say that the claim holds."""
    command = [
        sys.executable,
        "benchmarks/memory_cap.py",
        "--blocks",
        "1",
        "--width",
        "8",
        "--ranks",
        "1",
        "--steps",
        "1",
    ]
    done = subprocess.run(
        [*command, "--cap", "1", "--folder", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "NOT SO: the cap is not below the training state" in done.stdout
    assert "NOT SO: with offload it should have given the losses" in done.stdout


def test_zero_is_found_on_first_use() -> None:
    """`import megazero` imports no torch, and `megazero.zero.Init` needs no import of its own."""
    code = "import sys, megazero; assert 'torch' not in sys.modules; assert megazero.zero.Init"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)
