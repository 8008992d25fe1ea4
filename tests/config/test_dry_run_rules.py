"""The rules of a dry run."""

from __future__ import annotations

from typing import Any

import pytest

from megazero.config.derive import derive
from megazero.config.rules import find_problems
from tests.config.settings import config_with

ONLY = "is for a dry run; a run has the ranks that its launcher starts. Give --dry-run too, or leave out"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dry_run__dry_run": True, "dry_run__world_size": 4, "dry_run__rank": 3}, ""),
        (
            {"dry_run__dry_run": True, "dry_run__world_size": 4, "dry_run__rank": 4},
            "--rank 4 is not one of 4 ranks, which count from 0. Use --rank 3 or less.",
        ),
        ({"dry_run__rank": 2}, f"--rank 2 {ONLY} --rank."),
        ({"dry_run__world_size": 2}, f"--world-size 2 {ONLY} --world-size."),
        (
            {"dry_run__dry_run": True, "dry_run__device_memory": "80 apples"},
            "--device-memory '80 apples' is not a size: a number, followed by GiB, GB, MiB or another such unit, or by "
            "nothing for bytes. Use 80GiB, for instance.",
        ),
        ({"dry_run__dry_run": True, "data__mock_data": False}, ""),
        (
            {"dry_run__dry_run": True, "model__vocab_size": None, "data__tokenizer_model": "t"},
            "the vocabulary's size is unknown: a dry run reads no files, and --tokenizer-model t is one. "
            "Give --vocab-size N.",
        ),
    ],
)
def test_rule_and_message(changes: dict[str, Any], problem: str) -> None:
    assert find_problems(derive(config_with(**changes), None), None) == ([problem] if problem else [])


def test_the_ranks_are_checked_where_they_are_known() -> None:
    config = config_with(dry_run__dry_run=True, dry_run__rank=2)
    assert find_problems(derive(config, None), None) == []
    assert len(find_problems(derive(config, 2), 2)) == 1
