#!/usr/bin/env python3
"""Train a tokenizer on text files: byte-level BPE in Hugging Face's format, or SentencePiece.

    python tools/train_tokenizer.py --input data/stdlib.jsonl --vocab-size 8192 --output tokenizer/
        bpe             tokenizer/tokenizer.json, tokenizer_config.json: transformers.AutoTokenizer loads it
        sentencepiece   tokenizer/tokenizer.model (BPE with byte fallback)

The same text, size and library versions give the same tokenizer. Its end-of-document token is <|endoftext|> (</s>).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megazero.base.errors import ConfigError, DataError, MegazeroError
from megazero.base.optional import require
from megazero.data.corpus import expand_inputs, plan_parts, read_part

EOD = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1
"""Every byte, and the end-of-document token."""
PART = 32 << 20


def texts(inputs: Sequence[str], key: str) -> Iterator[str]:
    """All documents, in order. Raises DataError when there are none."""
    empty = True
    for part in plan_parts(expand_inputs(inputs), [key], PART):
        for block in read_part(part, [key]):
            for problem in block.problems:
                print(f"warning: {problem}; skipped", file=sys.stderr)
            for text in block.columns[0]:
                empty = empty and not text
                yield text
    if empty:
        raise DataError(f"there is no text under {key!r} in {' '.join(inputs)}. Check --input and --json-key.")


def train_bpe(documents: Iterator[str], vocab_size: int, folder: Path) -> int:
    """Byte-level BPE as GPT-2's. Returns the number of ids."""
    rust = require("tokenizers", "tokenizers", "to train byte-level BPE")
    tokenizer = rust.Tokenizer(rust.models.BPE())
    tokenizer.pre_tokenizer = rust.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = rust.decoders.ByteLevel()
    trainer = rust.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=rust.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "bos_token": EOD,
        "model_max_length": int(1e30),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return int(tokenizer.get_vocab_size())


def train_sentencepiece(documents: Iterator[str], vocab_size: int, folder: Path) -> int:
    """BPE with byte fallback that keeps spaces and newlines, as Llama's. Returns the number of ids."""
    sentencepiece = require("sentencepiece", "sentencepiece", "to train SentencePiece")
    longest = 4000  # bytes; the trainer skips longer sentences
    lines = (
        line[i : i + longest // 4]
        for text in documents
        for line in text.splitlines()
        for i in range(0, len(line), longest // 4)
    )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line.strip()),
            model_prefix=str(folder / "tokenizer"),
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=longest,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"--vocab-size {vocab_size}: SentencePiece cannot make it of this text: {error}. Choose another size."
        ) from error
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return int(model.vocab_size())


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flags.add_argument("--input", nargs="+", required=True, help="files or globs: .jsonl (.gz, .zst), .parquet, .txt")
    flags.add_argument("--json-key", default="text", help="key or column of the text")
    flags.add_argument(
        "--vocab-size", type=int, required=True, help="number of ids, the end-of-document token included"
    )
    flags.add_argument("--type", choices=["bpe", "sentencepiece"], default="bpe")
    flags.add_argument("--output", type=Path, required=True, help="folder for it")
    args = flags.parse_args()
    began = time.monotonic()
    temporary = args.output.with_name(f"{args.output.name}.{os.getpid()}.tmp")
    try:
        if args.vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"--vocab-size {args.vocab_size}: every byte needs an id, so at least {SMALLEST_VOCABULARY}."
            )
        temporary.mkdir(parents=True)
        train = train_bpe if args.type == "bpe" else train_sentencepiece
        size = train(texts(args.input, args.json_key), args.vocab_size, temporary)
        args.output.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), reverse=True):  # tokenizer.json last: with it the tokenizer is there
            os.replace(file, args.output / file.name)
    except (MegazeroError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{args.output}: {args.type}, {size} ids, {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
