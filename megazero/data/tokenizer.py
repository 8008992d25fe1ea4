"""Text to token ids and back: one small protocol over four kinds of tokenizer, named as Megatron names them.

Ids are those of the tokenizer alone: no beginning-of-sequence token is added. `tokenizers` and `sentencepiece` are
imported only by the kind that needs them; torch and transformers only for a folder without tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megazero.base.errors import DataError
from megazero.base.optional import require
from megazero.config.schema import DataConfig

EOD_NAMES = ("<|endoftext|>", "<eod>", "<|end_of_text|>", "</s>", "<eos>")
"""Names of the end-of-document token, tried in order when the tokenizer's own files name none."""
GPT2_PATTERN_FILES = ("vocab.json", "merges.txt")


class Tokenizer(Protocol):
    """What megazero asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is below it."""

    @property
    def eod(self) -> int | None:
        """Id that ends a document, None when the vocabulary has none."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def definition(self) -> bytes:
        """All that its ids depend on: equal definitions give equal ids."""


class HuggingFaceTokenizer:
    """A folder with tokenizer.json (or that file itself); a folder without one goes through transformers."""

    def __init__(self, path: str) -> None:
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if file.is_file():
            rust = require("tokenizers", "tokenizers", "to read tokenizer.json")
            try:
                self.backend: Any = rust.Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises bare Exception
                raise DataError(f"{file} is not a tokenizer.json: {error}. Save the tokenizer again.") from error
            named = _eos_in_files(file.parent)
        elif Path(path).is_dir():
            fast = _transformers_tokenizer(path)
            self.backend, named = fast.backend_tokenizer, fast.eos_token
        else:
            raise DataError(f"tokenizer {path} does not exist. Give a folder or a tokenizer.json file.")
        # No padding or truncation, whatever the file asks for: a document is tokenized whole.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size: int = 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eod: int | None = _first_id(self.backend.token_to_id, named)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def definition(self) -> bytes:
        return self.backend.to_str().encode()


class GPT2BPETokenizer(HuggingFaceTokenizer):
    """A folder with GPT-2's vocab.json and merges.txt."""

    def __init__(self, path: str) -> None:
        missing = [name for name in GPT2_PATTERN_FILES if not (Path(path) / name).is_file()]
        if missing:
            raise DataError(
                f"GPT2BPETokenizer needs {' and '.join(GPT2_PATTERN_FILES)} in a folder; {path} lacks "
                f"{' and '.join(missing)}. For a folder with tokenizer.json use HuggingFaceTokenizer."
            )
        rust = require("tokenizers", "tokenizers", "to read vocab.json and merges.txt")
        vocab, merges = (str(Path(path) / name) for name in GPT2_PATTERN_FILES)
        self.backend = rust.Tokenizer(rust.models.BPE.from_file(vocab, merges))
        self.backend.pre_tokenizer = rust.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = rust.decoders.ByteLevel()
        self.vocab_size = 1 + max(self.backend.get_vocab().values(), default=-1)
        self.eod = _first_id(self.backend.token_to_id, None)


class SentencePieceTokenizer:
    """A SentencePiece .model file, or a folder with exactly one."""

    def __init__(self, path: str) -> None:
        sentencepiece = require("sentencepiece", "sentencepiece", "to read a SentencePiece model")
        models = sorted(Path(path).glob("*.model")) if Path(path).is_dir() else [Path(path)]
        if len(models) != 1 or not models[0].is_file():
            found = f"is a folder with {len(models)} of them" if Path(path).is_dir() else "does not exist"
            raise DataError(f"SentencePieceTokenizer needs one .model file; {path} {found}. Give the file.")
        self.model_file = models[0]
        try:
            self.backend = sentencepiece.SentencePieceProcessor(model_file=str(models[0]))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{models[0]} is not a SentencePiece model: {error}. Train or copy it again.") from error
        self.vocab_size: int = self.backend.vocab_size()
        eos = self.backend.eos_id()
        self.eod: int | None = _first_id(self._id, self.backend.id_to_piece(eos) if eos >= 0 else None)
        self.control_pieces = [
            self.backend.id_to_piece(i) for i in range(self.vocab_size) if self.backend.is_control(i)
        ]

    def _id(self, piece: str) -> int | None:
        found = self.backend.piece_to_id(piece)
        return None if found == self.backend.unk_id() else found

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.backend.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(i) for i in ids])

    def definition(self) -> bytes:
        return self.model_file.read_bytes()


class NullTokenizer:
    """No text: ids as decimal numbers between spaces. The last id is the end-of-document token."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod: int | None = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"NullTokenizer reads numbers between spaces: {error}. Choose a tokenizer for text."
            ) from error
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise DataError(
                f"token ids {min(ids)} to {max(ids)} are outside 0 to {self.vocab_size - 1}. Raise --vocab-size."
            )
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def definition(self) -> bytes:
        return str(self.vocab_size).encode()


def build_tokenizer(data: DataConfig, vocab_size: int | None) -> Tokenizer:
    """The run's tokenizer. `vocab_size` is used by NullTokenizer, which has no files.

    Raises DataError when its files are missing or damaged, or NullTokenizer has no vocabulary size.
    """
    kind = data.tokenizer_type or ("HuggingFaceTokenizer" if data.tokenizer_model else "NullTokenizer")
    if kind == "NullTokenizer":
        if not vocab_size or vocab_size < 1:
            raise DataError(
                f"NullTokenizer has no vocabulary of its own and --vocab-size is {vocab_size}. Set --vocab-size, or "
                "--tokenizer-model."
            )
        return NullTokenizer(vocab_size)
    if data.tokenizer_model is None:
        raise DataError(f"--tokenizer-type {kind} needs --tokenizer-model, the folder or file of the tokenizer.")
    kinds = {c.__name__: c for c in (HuggingFaceTokenizer, GPT2BPETokenizer, SentencePieceTokenizer)}
    return kinds[kind](data.tokenizer_model)


def _eos_in_files(folder: Path) -> str | None:
    """The end-of-sequence token that tokenizer_config.json names, if it does."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text("utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not JSON of a tokenizer's settings: {error}. Save the tokenizer again.") from error
    return token["content"] if isinstance(token, dict) else token


def _first_id(lookup: Any, named: str | None) -> int | None:
    for name in (named, *EOD_NAMES) if named else EOD_NAMES:
        found = lookup(name)
        if found is not None:
            return int(found)
    return None


def _transformers_tokenizer(path: str) -> Any:
    """A folder that transformers can turn into a fast tokenizer (from vocab.json, tokenizer.model, …)."""
    transformers = require("transformers", "transformers", "to read a tokenizer folder without tokenizer.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, use_fast=True)
        tokenizer.backend_tokenizer  # noqa: B018 - slow tokenizers have none
    except Exception as error:  # from_pretrained raises many kinds
        raise DataError(
            f"{path} holds no tokenizer that transformers can load: {error}. Save it with save_pretrained."
        ) from error
    return tokenizer
