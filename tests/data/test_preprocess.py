"""tools/preprocess_data.py: the right tokens, whatever the workers, restarts and encoder; and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megazero.base.errors import ConfigError, DataError
from megazero.config.schema import DataConfig
from megazero.data import preprocess as module
from megazero.data.encoder import choose_encoder
from megazero.data.indexed import IndexedDataset
from megazero.data.preprocess import Job, Listener, append_to_each, preprocess
from megazero.data.tokenizer import NullTokenizer, build_tokenizer
from megazero.data.workers import run_tasks
from tests.data.conftest import ROOT, text, tool, write_jsonl


def tokenizer_of(model, kind=None):
    return build_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=str(model)), None)


def expected(tokenizer, texts, eod):
    return [tokenizer.encode(t) + ([tokenizer.eod] if eod else []) for t in texts if t]


def documents(prefix):
    data = IndexedDataset(prefix)
    assert data.document_indices.tolist() == list(range(len(data) + 1))
    return [sequence.tolist() for sequence in data]


def pair(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("fast", [(), ("--no-gigatoken",)])
def test_hugging_face_end_to_end(tmp_path, bpe, fast):
    texts = [text(i) for i in range(50)] + ["", "special <|endoftext|> inside", "naïve 漢字 🙂", "\x00"]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    done = tool(
        "preprocess_data.py", "--input", source, "--tokenizer-model", bpe, "--output-prefix", tmp_path / "out",
        "--workers", 2, "--append-eod", *fast,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("tokenizing with HuggingFaceTokenizer, as asked" if fast else "tokenizing with gigatoken") in done.stdout
    tokenizer = tokenizer_of(bpe)
    assert documents(tmp_path / "out_text_document") == expected(tokenizer, texts, True)
    assert IndexedDataset(tmp_path / "out_text_document").dtype == np.uint16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out_text_document.bin", "out_text_document.idx"]
    assert "54 documents" in done.stdout


def test_sentencepiece_end_to_end(tmp_path, sentencepiece):
    texts = [text(i) for i in range(30)] + ["html <s>struck</s> out", "naïve  漢字 🙂\n\n\tx"]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    done = tool(
        "preprocess_data.py", "--input", source, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model",
        sentencepiece, "--output-prefix", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokenizing with gigatoken" in done.stdout
    tokenizer = tokenizer_of(sentencepiece, "SentencePieceTokenizer")
    assert documents(tmp_path / "out_text_document") == expected(tokenizer, texts, False)


def test_two_keys_and_the_null_tokenizer(tmp_path):
    lines = [{"a": "1 2", "b": "70000"}, {"a": "", "b": "3"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = Job((str(tmp_path / "in.jsonl"),), str(tmp_path / "out"), keys=("a", "b"), append_eod=True)
    preprocess(job, NullTokenizer(80000), Listener())
    assert documents(tmp_path / "out_a_document") == [[1, 2, 79999]]
    assert documents(tmp_path / "out_b_document") == [[70000, 79999], [3, 79999]]
    assert IndexedDataset(tmp_path / "out_a_document").dtype == np.int32


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST_PART", 2000)


class Recorder(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.problems: list[str] = []
        self.total = self.done = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def start(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def advance(self, count: int) -> None:
        self.done += count


def test_output_does_not_depend_on_workers_or_parts(tmp_path, bpe, corpus, monkeypatch):
    tokenizer, pairs = tokenizer_of(bpe), []
    for number, (workers, smallest) in enumerate([(1, 1 << 30), (3, 2000), (2, 777)]):
        monkeypatch.setattr(module, "SMALLEST_PART", smallest)
        monkeypatch.setattr(module, "LARGEST_PART", smallest)
        listener = Recorder()
        preprocess(Job((str(corpus),), f"{tmp_path}/{number}", workers=workers), tokenizer, listener)
        pairs.append(pair(f"{tmp_path}/{number}_text_document"))
        assert listener.done == listener.total == corpus.stat().st_size
    assert pairs[0] == pairs[1] == pairs[2]


class Stop(Exception):
    pass


def interrupted(job, tokenizer):
    """A run that ends in the middle."""

    class Impatient(Recorder):
        def advance(self, count: int) -> None:
            super().advance(count)
            if self.done > self.total / 2:
                raise Stop

    with pytest.raises(Stop):
        preprocess(job, tokenizer, Impatient())


def test_a_run_goes_on_where_it_stopped(tmp_path, bpe, corpus, small_parts):
    job, tokenizer = Job((str(corpus),), str(tmp_path / "out"), append_eod=True), tokenizer_of(bpe)
    interrupted(job, tokenizer)
    assert not list(tmp_path.glob("*.bin"))
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.parts").glob("part-*.idx")}
    assert finished
    listener = Recorder()
    again = preprocess(job, tokenizer, listener)
    assert any("going on with" in line for line in listener.said)
    assert listener.done == listener.total
    assert documents(tmp_path / "out_text_document") == expected(tokenizer, [text(i) for i in range(300)], True)
    assert again.documents == 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out_text_document.bin", "out_text_document.idx"]


def test_other_settings_start_over(tmp_path, bpe, corpus, small_parts):
    tokenizer = tokenizer_of(bpe)
    interrupted(Job((str(corpus),), str(tmp_path / "out"), append_eod=True), tokenizer)
    listener = Recorder()
    preprocess(Job((str(corpus),), str(tmp_path / "out")), tokenizer, listener)
    assert any("starting over" in line for line in listener.said)
    assert documents(tmp_path / "out_text_document") == expected(tokenizer, [text(i) for i in range(300)], False)


def test_killed_run_goes_on(tmp_path, bpe):
    """kill -9 in mid-run: no output, no worker left behind; the same command again gives what one run would have."""
    source = write_jsonl(tmp_path / "in.jsonl", [text(i, 200) for i in range(400)])
    arguments = ["--input", source, "--tokenizer-model", bpe, "--workers", 2, "--no-gigatoken", "--output-prefix"]
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, arguments), str(tmp_path / "out")]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.parts").glob("part-*.json")):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not list(tmp_path.glob("out_*"))
    assert len(children) == 2
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "going on with" in again.stdout
    assert all(not Path(f"/proc/{child}/cmdline").exists() or not _is_tool(child) for child in children)
    whole = tool("preprocess_data.py", *arguments[:-2], "--output-prefix", tmp_path / "whole")
    assert whole.returncode == 0
    assert pair(tmp_path / "out_text_document") == pair(tmp_path / "whole_text_document")


def _is_tool(process: str) -> bool:
    return b"preprocess_data.py" in Path(f"/proc/{process}/cmdline").read_bytes()


def test_malformed_lines_are_counted_or_fatal(tmp_path, bpe):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"text": \n{"text": "good too"}\n{"txt": ""}\n')
    arguments = ("--input", source, "--tokenizer-model", bpe, "--output-prefix", tmp_path / "out")
    strict = tool("preprocess_data.py", *arguments, "--strict")
    assert strict.returncode == 1
    assert strict.stderr.startswith(f"error: {source}:2: not valid JSON")
    assert "leave out --strict" in strict.stderr
    assert not list(tmp_path.glob("out_*"))
    done = tool("preprocess_data.py", *arguments)
    assert done.returncode == 0
    assert f"warning: {source}:2: not valid JSON" in done.stderr
    assert f"warning: {source}:4: no key 'text' among ['txt']" in done.stderr
    assert "2 documents" in done.stdout
    assert "2 malformed lines skipped" in done.stdout


def test_strict_heeds_what_an_earlier_run_skipped(tmp_path, bpe, small_parts):
    write_jsonl(tmp_path / "in.jsonl", [text(i) for i in range(100)])
    with (tmp_path / "in.jsonl").open("r+") as file:
        file.write("!")
    job, tokenizer = Job((str(tmp_path / "in.jsonl"),), str(tmp_path / "out")), tokenizer_of(bpe)
    interrupted(job, tokenizer)
    with pytest.raises(DataError, match=r"in.jsonl:1: not valid JSON.*leave out --strict"):
        preprocess(Job(job.inputs, job.output_prefix, strict=True), tokenizer, Listener())


@pytest.mark.parametrize("content", ["", '{"text": ""}\n', "{\n"])
def test_no_text(tmp_path, bpe, content):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"there is no text in .*in.jsonl: . documents, all empty, and . malformed"):
        preprocess(Job((str(tmp_path / "in.jsonl"),), str(tmp_path / "out")), tokenizer_of(bpe), Listener())
    assert not list(tmp_path.glob("out_*"))


def test_settings_that_cannot_be(tmp_path, corpus):
    class Endless(NullTokenizer):
        def __init__(self) -> None:
            super().__init__(10)
            self.eod = None

    with pytest.raises(ConfigError) as caught:
        preprocess(Job((str(corpus),), str(tmp_path), ("a", "a"), 0, True), Endless(), Listener())
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--workers 0", "--append-eod", "--json-keys a a",
    ]  # fmt: skip


def test_unwritable_and_busy_outputs(tmp_path, bpe, corpus):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/out.parts"):
        preprocess(Job((str(corpus),), str(tmp_path / "file/out")), tokenizer_of(bpe), Listener())
    (tmp_path / "out.parts").mkdir()
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / "out.parts" / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(DataError, match=r"another process is writing .*out.parts"):
        preprocess(Job((str(corpus),), str(tmp_path / "out")), tokenizer_of(bpe), Listener())
    holder.communicate(b"\n")


def test_encoder_that_differs_is_not_used(bpe, sentencepiece, monkeypatch):
    import gigatoken

    tokenizer = tokenizer_of(bpe)
    assert choose_encoder(tokenizer, ["x"], True)[0].name == "gigatoken"
    other = gigatoken.Tokenizer.from_sentencepiece(sentencepiece / "tokenizer.model")
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda _: other)
    encoder, why = choose_encoder(tokenizer, ["x"], True)
    assert encoder.name == "HuggingFaceTokenizer"
    assert why == "tokenizing with HuggingFaceTokenizer: gigatoken gives other ids for ' '"
    assert encoder.encode([])[0].size == 0
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda _: 1 / 0)
    assert "does not support this tokenizer (division by zero)" in choose_encoder(tokenizer, ["x"], True)[1]
    monkeypatch.setattr("megazero.data.encoder.available", lambda _: False)
    assert "gigatoken is not installed (10x faster: pip install gigatoken)" in choose_encoder(tokenizer, ["x"], True)[1]
    assert "gigatoken has no such kind" in choose_encoder(NullTokenizer(9), [], True)[1]


def test_append_to_each():
    tokens, lengths = append_to_each(np.array([1, 2, 3]), np.array([2, 1]), 9)
    assert (tokens.tolist(), lengths.tolist()) == ([1, 2, 9, 3, 9], [3, 2])


def _work(task, report):
    report(1)
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 4:
        raise ZeroDivisionError("four")
    return task * task


def test_workers_that_fail():
    reports: list[int] = []
    assert dict(run_tasks(_work, [0, 1, 2], 2, reports.append, lambda: None)) == {0: 0, 1: 1, 2: 4}
    assert reports == [1, 1, 1]
    with pytest.raises(DataError, match=r"exit code -9 .*Run again to go on"):
        list(run_tasks(_work, [1, 3, 2], 2, reports.append, lambda: None))
    with pytest.raises(RuntimeError, match=r"(?s)a worker process failed.*ZeroDivisionError: four"):
        list(run_tasks(_work, [4], 2, reports.append, lambda: None))


def test_flags_of_megatrons_tool_that_are_not_here(tmp_path):
    done = tool("preprocess_data.py", "--input", "x", "--output-prefix", tmp_path / "o", "--partitions", "4")
    assert done.returncode == 2
    assert "--partitions: not needed: --workers divides any input evenly" in done.stderr


def test_collect_corpus(tmp_path):
    for name in ("a", "b"):
        done = tool("collect_corpus.py", "--output", tmp_path / "x" / f"{name}.jsonl")
        assert done.returncode == 0, done.stderr
    data = (tmp_path / "x" / "a.jsonl").read_bytes()
    assert data == (tmp_path / "x" / "b.jsonl").read_bytes()
    found = {document["path"]: document["text"] for document in map(json.loads, data.splitlines())}
    assert "class JSONDecoder" in found["json/decoder.py"]
    assert not [path for path in found if {"test", "tests", "site-packages"} & set(path.split("/"))]
    assert len(data) > 5e6
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "file").write_text("")
    done = tool("collect_corpus.py", "--output", tmp_path / "file" / "a.jsonl")
    assert (done.returncode, "cannot write" in done.stderr) == (1, True)
