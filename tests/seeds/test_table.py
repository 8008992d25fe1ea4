"""The table of the documents' blocks is complete and is the one in docs/."""

from __future__ import annotations

from pathlib import Path

from tests.seeds.blocks import blocks, code
from tests.seeds.table import ROWS, table
from tests.seeds.test_json import PARTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "seeds.md"


def test_every_block_has_a_row_and_every_change_applies() -> None:
    assert list(ROWS) == list(blocks())
    for name in ROWS:
        code(name)


def test_what_is_not_run_says_why() -> None:
    assert not [name for name, row in ROWS.items() if not row.ran and not row.why]


def test_what_is_said_to_run_is_in_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert not [name for name, row in ROWS.items() if row.ran and f'"{name}"' not in tests and name not in PARTS]


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == "\n".join(table()) + "\n", "run python -m tests.seeds.table > docs/seeds.md"
