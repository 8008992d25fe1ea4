"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.checkpoint_pieces import save_step


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder with the checkpoints of iterations 10 and 20."""
    save_step(tmp_path / "ckpt", 10, shift=10)
    save_step(tmp_path / "ckpt", 20, shift=20)
    return tmp_path / "ckpt"
