#!/usr/bin/env python3
"""Tokenize text files into Megatron's .bin/.idx: the command line of megazero.data.preprocess.

    python tools/preprocess_data.py --input 'corpus/*.jsonl.gz' --tokenizer-model tokenizer/ --workers 8 --append-eod \\
        --output-prefix data/corpus     makes data/corpus_text_document.bin and .idx

A killed run goes on where it stopped when the same command is given again. Flags are those of Megatron's tool.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megazero.base.errors import MegazeroError
from megazero.config.schema import DataConfig
from megazero.data.preprocess import Counts, Job, Listener, preprocess
from megazero.data.tokenizer import build_tokenizer

NOT_HERE = {
    "--partitions": "not needed: --workers divides any input evenly",
    "--keep-sequential-samples": "not needed: the output always has the input's order",
    "--split-sentences": "for BERT and T5, which megazero does not train",
    "--vocab-file": "use --tokenizer-model FOLDER, with vocab.json and merges.txt in it",
    "--merge-file": "use --tokenizer-model FOLDER, with vocab.json and merges.txt in it",
    "--find-optimal-num-workers": "not needed: use the number of cores",
    "--log-interval": "not needed: progress is shown by time",
}
LINE_SECONDS = 5.0
"""Time between progress lines when the output is no terminal."""
SHOWN_PROBLEMS = 20


class Parser(argparse.ArgumentParser):
    """Says of Megatron's other flags why they are not here."""

    def error(self, message: str) -> NoReturn:
        known = [f"{flag}: {why}" for flag, why in NOT_HERE.items() if flag in sys.argv]
        super().error("\n".join([message, *known]))


class PlainProgress(Listener):
    """Lines: the share done, MB/s of this run and the time left."""

    def __init__(self) -> None:
        self._problems = 0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def problem(self, text: str) -> None:
        self._problems += 1
        if self._problems <= SHOWN_PROBLEMS:
            print(f"warning: {text}; skipped", file=sys.stderr, flush=True)
        elif self._problems == SHOWN_PROBLEMS + 1:
            print("warning: more malformed lines follow; they are only counted", file=sys.stderr, flush=True)

    def start(self, total: int, done: int) -> None:
        self._total, self._before, self._done = total, done, done
        self._began = self._shown = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown >= LINE_SECONDS:
            self._shown = now
            rate = (self._done - self._before) / (now - self._began)
            left = (self._total - self._done) / rate
            self.say(
                f"{self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB | {rate / 1e6:.1f} MB/s | {left:.0f} s left"
            )

    def stop(self) -> None:
        """The work has ended, well or not."""


class BarProgress(PlainProgress):
    """rich's bar, on a terminal."""

    _bar = None

    def say(self, text: str) -> None:
        (self._bar.console.print if self._bar else print)(text)

    def start(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns)
        self._task = self._bar.add_task("tokenizing", total=total, completed=done)
        self._bar.start()

    def advance(self, count: int) -> None:
        assert self._bar is not None
        self._bar.advance(self._task, count)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def parser() -> Parser:
    """The flags; names and meaning as in Megatron's tool."""
    flags = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flags.add_argument("--input", nargs="+", required=True, help="files or globs: .jsonl (.gz, .zst), .parquet, .txt")
    flags.add_argument("--json-keys", nargs="+", default=["text"], help="keys or columns to tokenize, each into a pair")
    flags.add_argument("--output-prefix", required=True, help="the pairs are called PREFIX_KEY_document.bin and .idx")
    kinds = ["HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "NullTokenizer"]
    flags.add_argument("--tokenizer-type", choices=kinds, help="default: HuggingFaceTokenizer")
    flags.add_argument("--tokenizer-model", help="folder or file of the tokenizer")
    flags.add_argument("--vocab-size", type=int, help="number of ids, for NullTokenizer")
    flags.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    flags.add_argument("--workers", type=int, default=1, help="processes")
    flags.add_argument("--strict", action="store_true", help="a malformed line is fatal")
    flags.add_argument(
        "--no-gigatoken", action="store_true", help="use the tokenizer itself even where gigatoken agrees"
    )
    return flags


def main() -> int:
    args = parser().parse_args()
    began = time.monotonic()
    progress = BarProgress() if sys.stdout.isatty() else PlainProgress()
    job = Job(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        keys=tuple(args.json_keys),
        workers=args.workers,
        append_eod=args.append_eod,
        strict=args.strict,
        use_gigatoken=not args.no_gigatoken,
    )
    try:
        tokenizer = build_tokenizer(
            DataConfig(tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model), args.vocab_size
        )
        counts = preprocess(job, tokenizer, progress)
    except MegazeroError as error:
        progress.stop()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.stop()
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    progress.stop()
    _report(job, counts, time.monotonic() - began)
    return 0


def _report(job: Job, counts: Counts, seconds: float) -> None:
    names = ", ".join(f"{job.output_prefix}_{key}_document" for key in job.keys)
    skipped = f", {counts.malformed} malformed lines skipped" if counts.malformed else ""
    print(f"{names}: {counts.documents} documents, {counts.tokens} tokens{skipped}, {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
