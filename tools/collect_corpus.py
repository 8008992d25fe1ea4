#!/usr/bin/env python3
"""The embedded default corpus: the source of the running interpreter's own standard library, as JSONL.

    python tools/collect_corpus.py --output data/stdlib.jsonl   one line a file: {"text": …, "path": "json/decoder.py"}

Real text that is there wherever Python is. Test suites, installed packages and generated tables are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "turtledemo",
    "__pycache__",
    "encodings",
}
"""encodings are tables of characters; the others are tests or not the library."""
SKIPPED_FILES = {"pydoc_data/topics.py", "_pydecimal.py"}
SMALLEST = 200
"""Shorter files are stubs."""


def documents(root: Path) -> Iterator[dict[str, str]]:
    """The library's files in the order of their names, each once."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(name.split("/")[:-1]) or name in SKIPPED_FILES:
            continue
        try:
            with tokenize.open(path) as file:  # heeds the file's own encoding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # not a file of the library that Python could run
        if len(text) >= SMALLEST and text not in seen:
            seen.add(text)
            yield {"text": text, "path": name}


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flags.add_argument("--output", required=True, type=Path, help="the .jsonl file to make")
    output: Path = flags.parse_args().output
    root = Path(sysconfig.get_paths()["stdlib"])
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    files = size = 0
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for document in documents(root):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
                files, size = files + 1, size + len(document["text"])
        if not files:
            temporary.unlink()
            print(f"error: {root} has no Python source; this interpreter was installed without it", file=sys.stderr)
            return 1
        os.replace(temporary, output)
    except OSError as error:
        print(f"error: cannot write {output}: {error.strerror}. Choose a writable folder.", file=sys.stderr)
        return 1
    print(f"{output}: {files} files of Python {sys.version.split()[0]}'s standard library, {size / 1e6:.1f} MB of text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
