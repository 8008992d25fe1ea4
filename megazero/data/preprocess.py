"""Text files to .bin/.idx, by several processes, so that a killed run goes on where it stopped.

    inputs -> parts (corpus.plan_parts) -> workers: read, tokenize -> OUTPUT.parts/part-00007_text.{bin,idx}, .json last
           -> joined in order into OUTPUT_text_document.{bin,idx} -> OUTPUT.parts removed

The parts depend on the inputs alone, so the output is the same for any number of workers and of restarts.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megazero.base.errors import ConfigError, DataError
from megazero.data.corpus import Part, Problem, expand_inputs, plan_parts, read_part
from megazero.data.encoder import Encoder, choose_encoder
from megazero.data.indexed import IndexedWriter, merge, optimal_dtype
from megazero.data.tokenizer import Tokenizer
from megazero.data.workers import run_tasks

SMALLEST_PART, LARGEST_PART = 2 << 20, 32 << 20
SAMPLE_PARTS, SAMPLE_BYTES = 8, 32 << 10
"""gigatoken is checked on this many bytes of each of this many parts."""
KEPT_PROBLEMS = 100
"""Malformed lines of a part whose places are kept; the others are counted."""


@dataclass(frozen=True)
class Job:
    """What to tokenize, into what."""

    inputs: tuple[str, ...]
    """Files and globs."""
    output_prefix: str
    keys: tuple[str, ...] = ("text",)
    workers: int = 1
    append_eod: bool = False
    strict: bool = False
    """Stop at the first line that is no document."""
    use_gigatoken: bool = True


@dataclass
class Counts:
    """What became of a part, or of all."""

    documents: int = 0
    tokens: int = 0
    malformed: int = 0
    problems: list[str] = field(default_factory=list)
    """Places and reasons of the first malformed lines."""


class Listener:
    """Told what happens, in this process; override what is of interest."""

    def say(self, text: str) -> None:
        """One line for the user."""

    def problem(self, text: str) -> None:
        """A malformed line was left out."""

    def start(self, total: int, done: int) -> None:
        """Workers begin: bytes of the input, and how many of them an earlier run has done."""

    def advance(self, count: int) -> None:
        """Bytes of the input were read and tokenized."""


def preprocess(job: Job, tokenizer: Tokenizer, listener: Listener) -> Counts:
    """Tokenize; one pair `{output_prefix}_{key}_document` a key appears when all is done.

    Call it while the process has one thread: it forks. Raises ConfigError for settings that cannot be, DataError for
    inputs that cannot be read, hold no document, or (strict) hold a malformed line.
    """
    _check(job, tokenizer)
    paths = expand_inputs(job.inputs)
    total = sum(os.path.getsize(path) for path in paths)
    parts = plan_parts(paths, job.keys, min(max(total // 64, SMALLEST_PART), LARGEST_PART))
    folder = Path(f"{job.output_prefix}.parts")
    with _claim(folder):
        _open_plan(folder, _plan(job, tokenizer, paths, parts), listener)
        finished = {i: counts for i in range(len(parts)) if (counts := _read_counts(folder, i)) is not None}
        if finished:
            listener.say(f"going on with {folder}: {len(finished)} of {len(parts)} parts are done")
        encoder, why = choose_encoder(tokenizer, _sample(parts, job.keys), job.use_gigatoken)
        listener.say(why)
        work = _Work(parts, folder, job, encoder, optimal_dtype(tokenizer.vocab_size), tokenizer.eod)
        for counts in finished.values():
            _tell_problems(counts, job, listener)
        tasks = [i for i in range(len(parts)) if i not in finished]
        done = sum(parts[i].size for i in finished)
        started = partial(listener.start, sum(part.size for part in parts), done)
        for i, result in run_tasks(work.run, tasks, job.workers, listener.advance, started):
            finished[i] = result
            _tell_problems(result, job, listener)
        summary = _summary(finished.values(), paths)
        for key in job.keys:
            _join(folder, len(parts), key, f"{job.output_prefix}_{key}_document")
        shutil.rmtree(folder)
    return summary


@dataclass(frozen=True)
class _Work:
    """All that a worker needs; it is inherited by fork, not sent."""

    parts: Sequence[Part]
    folder: Path
    job: Job
    encoder: Encoder
    dtype: np.dtype
    eod: int | None

    def run(self, index: int, advance: Callable[[int], None]) -> Counts:
        """Tokenize one part; its .json, written last, says that it is whole."""
        counts = Counts()
        writers = [IndexedWriter(_part_prefix(self.folder, index, key), self.dtype) for key in self.job.keys]
        left = self.parts[index].size
        for block in read_part(self.parts[index], self.job.keys):
            _note_problems(block.problems, counts, self.job.strict)
            for writer, column in zip(writers, block.columns, strict=True):
                tokens, lengths = self.encoder.encode(column)
                lengths = lengths[lengths > 0]
                if self.job.append_eod:
                    assert self.eod is not None
                    tokens, lengths = append_to_each(tokens, lengths, self.eod)
                writer.add_documents(tokens, lengths)
                counts.tokens += len(tokens)
            counts.documents += len(block.columns[0])
            advance(block.size)
            left -= block.size
        for writer in writers:
            writer.close()
        advance(left)  # lines cross the edges of parts: here the sum becomes right
        _write_json(_counts_path(self.folder, index), asdict(counts))
        return counts


def append_to_each(tokens: NDArray, lengths: NDArray[np.int64], token: int) -> tuple[NDArray, NDArray[np.int64]]:
    """The documents, each with one more token at its end."""
    return np.insert(tokens, np.cumsum(lengths), token), lengths + 1


def _check(job: Job, tokenizer: Tokenizer) -> None:
    problems = []
    if job.workers < 1:
        problems.append(f"--workers {job.workers}: at least one process must work.")
    if job.append_eod and tokenizer.eod is None:
        problems.append(
            "--append-eod: the tokenizer has no end-of-document token. Leave it out, or add eos_token to it."
        )
    if len(set(job.keys)) != len(job.keys) or not job.keys:
        problems.append(f"--json-keys {' '.join(job.keys)}: give each key once.")
    if problems:
        raise ConfigError(*problems)


def _plan(job: Job, tokenizer: Tokenizer, paths: Sequence[str], parts: Sequence[Part]) -> dict[str, Any]:
    """All that the parts' content depends on."""
    stats = [(path, os.stat(path)) for path in paths]
    return {
        "version": 1,
        "inputs": [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "parts": [[part.path, part.begin, part.end] for part in parts],
        "keys": list(job.keys),
        "append_eod": job.append_eod,
        "tokenizer": hashlib.blake2b(tokenizer.definition(), digest_size=16).hexdigest(),
    }


def _open_plan(folder: Path, plan: dict[str, Any], listener: Listener) -> None:
    """Make the work folder this plan's: what an earlier run left for another plan is removed."""
    path = folder / "plan.json"
    if path.exists() and _read_json(path) == plan:
        return
    if any(child.name != ".lock" for child in folder.iterdir()):
        listener.say(f"starting over: the input or the settings are not those of the run that left {folder}")
        for child in folder.iterdir():
            if child.name != ".lock":
                child.unlink()
    _write_json(path, plan)


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """The work folder for this process alone. A POSIX lock: it ends with its process, and workers don't inherit it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}. Choose a writable --output-prefix.") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another process is writing {folder}. Wait for it, or choose another --output-prefix."
            ) from error
        yield


def _sample(parts: Sequence[Part], keys: Sequence[str]) -> list[str]:
    """Texts from all over the input, on which tokenizers are compared."""
    step = max(len(parts) // SAMPLE_PARTS, 1)
    texts: list[str] = []
    for part in parts[::step][:SAMPLE_PARTS]:
        for block in read_part(part, keys, SAMPLE_BYTES):
            taken = 0
            for text in (text for column in block.columns for text in column):
                if taken < SAMPLE_BYTES:
                    texts.append(text[: SAMPLE_BYTES - taken])
                    taken += len(texts[-1])
            break
    return texts


def _note_problems(problems: Sequence[Problem], counts: Counts, strict: bool) -> None:
    if problems and strict:
        raise DataError(f"{problems[0]}. Repair the line, or leave out --strict to skip such lines.")
    counts.malformed += len(problems)
    counts.problems += [str(problem) for problem in problems[: KEPT_PROBLEMS - len(counts.problems)]]


def _tell_problems(counts: Counts, job: Job, listener: Listener) -> None:
    if counts.malformed and job.strict:
        raise DataError(f"{counts.problems[0]}. Repair the line, or leave out --strict to skip such lines.")
    for text in counts.problems:
        listener.problem(text)


def _join(folder: Path, parts: int, key: str, prefix: str) -> None:
    """All parts of a key as one pair; first away with what a run left that was killed while it joined."""
    for stale in Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}.*.tmp"):
        stale.unlink()
    merge([_part_prefix(folder, i, key) for i in range(parts)], prefix)


def _summary(results: Iterable[Counts], paths: Sequence[str]) -> Counts:
    total = Counts()
    for counts in results:
        total.documents += counts.documents
        total.tokens += counts.tokens
        total.malformed += counts.malformed
    if total.tokens == 0:
        files = paths[0] if len(paths) == 1 else f"{len(paths)} files"
        raise DataError(
            f"there is no text in {files}: {total.documents} documents, all empty, and {total.malformed} malformed "
            "lines. Check --input and --json-keys."
        )
    return total


def _part_prefix(folder: Path, index: int, key: str) -> str:
    return str(folder / f"part-{index:05d}_{key}")


def _counts_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.json"


def _read_counts(folder: Path, index: int) -> Counts | None:
    path = _counts_path(folder, index)
    return Counts(**_read_json(path)) if path.exists() else None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value), "utf-8")
    os.replace(temporary, path)
