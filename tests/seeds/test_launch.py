"""The shell blocks: the launcher's dry run of each command."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.seeds.blocks import code

ROOT = Path(__file__).resolve().parents[2]


def command(name: str) -> list[str]:
    return shlex.split(code(name).replace("\\\n", " "))


def dry_run(name: str, folder: Path) -> str:
    """What `megazero launch --dry-run` prints for a block."""
    words = command(name)
    assert words[:2] == ["megazero", "launch"]
    done = subprocess.run(
        [sys.executable, "-m", "megazero.cli", "launch", "--dry-run", *words[2:]],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["S2 5.3 launch", "S2 12.1 launch"])
def test_one_machine(name: str, tmp_path: Path) -> None:
    started = dry_run(name, tmp_path)
    own = command(name)[4:]  # the alias, the script and its flags, passed on as they are
    assert own[0] == "megazero.integrations.deepspeed" and shlex.split(started)[-len(own) :] == own
    assert "--nproc-per-node 8" in started


def test_several_machines(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("".join(f"node{i} slots=8\n" for i in range(4)))
    lines = dry_run("S2 7.1 launch", tmp_path).splitlines()
    assert len(lines) == 4 and all(f"node{i}" in line for i, line in enumerate(lines))
    assert all(
        "--tensor-model-parallel-size 4" in line and "--deepspeed_config ds_config.json" in line for line in lines
    )


def test_pretrain_gpt_takes_the_flags_of_7_1(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    words = command("S2 7.1 launch")
    flags = words[words.index("pretrain_gpt.py") + 1 :]
    plan = ["--dry-run", "--world-size", "32", "--device-memory", "200GiB", "--mock-data", "--vocab-size", "50304"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *flags, *plan],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "\nfits: " in done.stdout and "parameters of rank 0: 11," in done.stdout  # 175 billion over 16 ranks
