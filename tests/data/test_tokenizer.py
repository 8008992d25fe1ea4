"""The four kinds of tokenizer: ids, end of document, and what is said of files that are none."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer

from megazero.base.errors import DataError
from megazero.config.schema import DataConfig
from megazero.data.tokenizer import NullTokenizer, build_tokenizer
from tests.data.conftest import text, tool


def build(kind, model, vocab_size=None):
    return build_tokenizer(
        DataConfig(tokenizer_type=kind, tokenizer_model=None if model is None else str(model)), vocab_size
    )


def test_hugging_face(bpe):
    tokenizer = build(None, bpe)
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"
    reference = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    for sample in (text(5), "", "naïve 漢字 🙂"):
        assert tokenizer.encode(sample) == reference.encode(sample, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.encode_batch([text(1), text(2)]) == [tokenizer.encode(text(1)), tokenizer.encode(text(2))]
    file = build("HuggingFaceTokenizer", bpe / "tokenizer.json")
    assert (file.eod, file.definition()) == (tokenizer.eod, tokenizer.definition())


def test_transformers_loads_what_the_tool_trains(bpe):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(bpe))
    tokenizer = build(None, bpe)
    assert loaded.eos_token_id == tokenizer.eod
    assert loaded(text(3), add_special_tokens=False)["input_ids"] == tokenizer.encode(text(3))


def test_a_folder_without_tokenizer_json_goes_through_transformers(bpe, tmp_path):
    source = json.loads((bpe / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(source["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    expected = build(None, bpe)
    for kind in ("HuggingFaceTokenizer", "GPT2BPETokenizer"):
        tokenizer = build(kind, tmp_path)
        assert tokenizer.encode(text(9)) == expected.encode(text(9))
        assert (tokenizer.vocab_size, tokenizer.eod) == (400, expected.eod)


def test_no_beginning_token_is_added_and_nothing_is_cut(bpe, tmp_path):
    shutil.copytree(bpe, tmp_path / "t")
    rust = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    rust.enable_truncation(4)
    rust.enable_padding()
    rust.save(str(tmp_path / "t" / "tokenizer.json"))
    assert build(None, tmp_path / "t").encode(text(2)) == build(None, bpe).encode(text(2))


def test_sentencepiece(sentencepiece):
    tokenizer = build("SentencePieceTokenizer", sentencepiece)
    assert tokenizer.vocab_size == 400
    assert tokenizer.eod == 2
    sample = "def f(x):\n\treturn  x[3]  # naïve 漢字 🙂"
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.encode_batch([sample, ""]) == [tokenizer.encode(sample), []]
    assert build("SentencePieceTokenizer", sentencepiece / "tokenizer.model").definition() == tokenizer.definition()


def test_null():
    tokenizer = build(None, None, 10)
    assert isinstance(tokenizer, NullTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod) == (10, 9)
    assert tokenizer.encode(" 1 2  9\n") == [1, 2, 9]
    assert tokenizer.encode_batch(["1", ""]) == [[1], []]
    assert tokenizer.decode([1, 2]) == "1 2"
    with pytest.raises(DataError, match=r"reads numbers between spaces"):
        tokenizer.encode("one")
    with pytest.raises(DataError, match=r"token ids 1 to 10 are outside 0 to 9"):
        tokenizer.encode("1 10")


def test_training_is_deterministic(bpe, corpus, tmp_path):
    tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 400, "--output", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (bpe / "tokenizer.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again"]


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("HuggingFaceTokenizer", None, "tokenizer .*t does not exist"),
        ("HuggingFaceTokenizer", {"tokenizer.json": "{}"}, "is not a tokenizer.json"),
        ("HuggingFaceTokenizer", {"readme": ""}, "holds no tokenizer that transformers can load"),
        ("GPT2BPETokenizer", {"vocab.json": "{}"}, "t lacks merges.txt"),
        ("SentencePieceTokenizer", None, "needs one .model file; .*t does not exist"),
        ("SentencePieceTokenizer", {}, "is a folder with 0 of them"),
        ("SentencePieceTokenizer", {"a.model": "x"}, "is not a SentencePiece model"),
    ],
)
def test_files_that_are_none(tmp_path, kind, files, message):
    if files is not None:
        (tmp_path / "t").mkdir()
        for name, content in files.items():
            (tmp_path / "t" / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build(kind, tmp_path / "t")


def test_settings_that_are_missing(bpe, tmp_path):
    with pytest.raises(DataError, match=r"GPT2BPETokenizer needs --tokenizer-model"):
        build("GPT2BPETokenizer", None)
    with pytest.raises(DataError, match=r"--vocab-size is None"):
        build("NullTokenizer", None)
    shutil.copytree(bpe, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config.json is not JSON"):
        build(None, tmp_path / "t")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", 100], "--vocab-size 100: every byte needs an id, so at least 257"),
        (["--vocab-size", 400, "--json-key", "body"], "there is no text under 'body'"),
        (["--vocab-size", 90000, "--type", "sentencepiece"], "SentencePiece cannot make it of this text"),
    ],
)
def test_training_that_cannot_be(corpus, tmp_path, arguments, message):
    done = tool("train_tokenizer.py", "--input", corpus, "--output", tmp_path / "t", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
