"""Small tokenizers, trained once a session by the tool that users train with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = [
    "import",
    "return",
    "self",
    "None",
    "value",
    "error",
    "string",
    "encoding",
    "decode",
    "buffer",
    "naïve",
    "漢字",
]


def text(number: int, lines: int = 8) -> str:
    """Code-like text, different for each number."""
    return "".join(
        f"def {WORDS[(number + i) % 11]}_{number % 97}(x):\n"
        f"    return {WORDS[(number * 3 + i) % 12]}[{number * 7 + i}]\n"
        for i in range(lines)
    )


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    return path


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A tool as a user runs it."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", [text(i) for i in range(300)])


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "bpe"
    done = tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 400, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "sp"
    kind = ("--type", "sentencepiece")
    done = tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 400, "--output", folder, *kind)
    assert done.returncode == 0, done.stderr
    return folder
