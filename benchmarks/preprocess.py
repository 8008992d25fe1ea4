#!/usr/bin/env python3
"""MB/s of tools/preprocess_data.py on 40 MB of text, beside plain Hugging Face tokenizers on the same text.

    python benchmarks/preprocess.py        JSONL to .bin/.idx, end to end as a user runs it, process start included

The text is the standard library's source, repeated with its identifiers varied so that no two copies are equal. The
peer is `tokenizers.encode_batch` over all documents in one process with as many threads, tokens only (no files): a
generous peer. Both run in turns, so that a noisy machine is noisy for both; the best and the median of each are shown.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER = """
import json, sys, time
from tokenizers import Tokenizer
began = time.monotonic()
tokenizer = Tokenizer.from_file(sys.argv[2])
with open(sys.argv[1], encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
count = sum(len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False))
print(json.dumps({"seconds": time.monotonic() - began, "tokens": count}))
"""


def make_corpus(folder: Path, megabytes: float) -> Path:
    """JSONL of about this many MB of text: copies of the library whose words of five letters and more are changed."""
    source, target = folder / "stdlib.jsonl", folder / "corpus.jsonl"
    run("tools/collect_corpus.py", "--output", str(source))
    documents = [json.loads(line)["text"] for line in source.read_text("utf-8").splitlines()]
    size = copy = 0
    with target.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            for text in documents:
                varied = re.sub(r"\b([a-z]{5,})\b", rf"\1_{copy}", text) if copy else text
                file.write(json.dumps({"text": varied}) + "\n")
                size += len(varied.encode())
                if size >= megabytes * 1e6:
                    break
            copy += 1
    return target


def run(*command: str) -> str:
    """A script of the repository under this interpreter; its output."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def timed(*command: str) -> tuple[float, str]:
    began = time.monotonic()
    output = run(*command)
    return time.monotonic() - began, output


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flags.add_argument("--megabytes", type=float, default=40.0)
    flags.add_argument("--workers", type=int, default=2)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--vocab-size", type=int, default=8192)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.megabytes)
        vocabulary = ("--vocab-size", str(args.vocab_size))
        run(
            "tools/train_tokenizer.py",
            "--input",
            str(folder / "stdlib.jsonl"),
            *vocabulary,
            "--output",
            f"{folder}/tok",
        )
        text = sum(len(json.loads(line)["text"].encode()) for line in corpus.open(encoding="utf-8"))
        ours: list[float] = []
        peer: list[float] = []
        tool = ("tools/preprocess_data.py", "--input", str(corpus), "--tokenizer-model", f"{folder}/tok")
        for number in range(args.rounds):
            out = ("--output-prefix", f"{folder}/out{number}", "--workers", str(args.workers), "--append-eod")
            seconds, output = timed(*tool, *out)
            ours.append(text / 1e6 / seconds)
            _, answer = timed("-c", PEER, str(corpus), f"{folder}/tok/tokenizer.json")
            peer.append(text / 1e6 / json.loads(answer)["seconds"])
            print(f"round {number + 1}: tools/preprocess_data.py {ours[-1]:.1f} MB/s, encode_batch {peer[-1]:.1f} MB/s")
        print(output.splitlines()[0])
        middle, middle_peer = statistics.median(ours), statistics.median(peer)
        print(
            f"{text / 1e6:.1f} MB of text, {args.workers} workers: best {max(ours):.1f}, median {middle:.1f} MB/s; "
            f"encode_batch best {max(peer):.1f}, median {middle_peer:.1f}; ratio of medians {middle / middle_peer:.1f}"
        )


if __name__ == "__main__":
    main()
