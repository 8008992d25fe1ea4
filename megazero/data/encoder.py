"""Many texts to token ids, as fast as the tokenizer allows: gigatoken where it gives the same ids, else the tokenizer.

gigatoken (https://pypi.org/project/gigatoken) is held against the tokenizer on hard cases and on a sample of the input
before it is trusted; what it is known to read differently (control pieces of SentencePiece in plain text) goes to the
tokenizer text by text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megazero.base.optional import available, require
from megazero.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

HARD_CASES = (
    "",
    " ",
    "  leading and trailing  ",
    "tabs\t\tand\r\nlines\n\n\n  indented\n",
    "don't I'LL we've 'quoted'",
    "1234567890 3.14159 0x1F 1,000,000",
    "naïve café Ünïcödé \ufb01 ½ \uff21",  # a ligature and a fullwidth letter, which some tokenizers normalize
    "e\u0301 vs \u00e9",
    "漢字かな交じり文 한국어 русский العربية",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f\u200d\U0001f308",
    "\u00a0nbsp\u200bzero\u3000wide\ufeff",
    "def f(x):\n    return {'a': [x, -x]}  # !?\n",
    "\x00\x01\x7f",
    "a" * 300,
    "=" * 100 + "\n" + "-" * 77,
    "CamelCaseHTTPServer_snake_case",
    "\u2581 \u2581\u2581 underscores __init__",
)


class Encoder(Protocol):
    """Token ids of texts."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[NDArray, NDArray[np.int64]]:
        """(ids of all texts back to back, number of ids of each text)."""


class ReferenceEncoder:
    """The tokenizer itself, one text at a time: workers are processes, so it must start no threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = type(tokenizer).__name__
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[NDArray, NDArray[np.int64]]:
        ids = [np.asarray(self._tokenizer.encode(text), np.int64) for text in texts]
        return np.concatenate([np.empty(0, np.int64), *ids]), np.asarray([len(x) for x in ids], np.int64)


class GigatokenEncoder:
    """gigatoken for all texts but those that hold one of `left_to_reference`."""

    name = "gigatoken"

    def __init__(self, backend: Any, reference: ReferenceEncoder, left_to_reference: Sequence[str]) -> None:
        self._backend, self._reference, self._left = backend, reference, tuple(left_to_reference)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray, NDArray[np.int64]]:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        if not any(word in text for word in self._left for text in texts):
            # parallel=False: workers are processes, and threads of the parent do not survive the fork.
            layout = self._backend.encode_batch(list(texts), parallel=False).layout
            offsets = np.asarray(layout.offsets.data)
            return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
        parts = []
        for text in texts:
            special = any(word in text for word in self._left)
            parts.append(self._reference.encode([text])[0] if special else self._backend.encode(text))
        return np.concatenate(parts), np.asarray([len(part) for part in parts], np.int64)


def choose_encoder(tokenizer: Tokenizer, sample: Sequence[str], use_gigatoken: bool) -> tuple[Encoder, str]:
    """The encoder, and one line that says why. `sample`: texts of the input on which ids are compared."""
    reference = ReferenceEncoder(tokenizer)
    if not use_gigatoken:
        return reference, f"tokenizing with {reference.name}, as asked"
    if not isinstance(tokenizer, HuggingFaceTokenizer | SentencePieceTokenizer):
        return reference, f"tokenizing with {reference.name}: gigatoken has no such kind"
    if not available("gigatoken"):
        return (
            reference,
            f"tokenizing with {reference.name}: gigatoken is not installed (10x faster: pip install gigatoken)",
        )
    gigatoken = require("gigatoken", "gigatoken", "to tokenize fast")
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            backend, left = gigatoken.Tokenizer.from_sentencepiece(tokenizer.model_file), tokenizer.control_pieces
        else:
            backend, left = gigatoken.Tokenizer.from_json(tokenizer.backend.to_str()), []
        candidate = GigatokenEncoder(backend, reference, left)
        specials = _special_cases(tokenizer) if isinstance(tokenizer, HuggingFaceTokenizer) else []
        different = _first_difference(reference, candidate, [*HARD_CASES, *specials, *sample])
    except BaseException as error:  # what a Rust extension raises on a panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return (
            reference,
            f"tokenizing with {reference.name}: gigatoken does not support this tokenizer ({str(error)[:120]})",
        )
    if different is not None:
        shown = different if len(different) <= 40 else different[:40] + "…"
        return reference, f"tokenizing with {reference.name}: gigatoken gives other ids for {shown!r}"
    return (
        candidate,
        f"tokenizing with gigatoken; its ids equal {reference.name}'s on {len(sample)} documents of the input",
    )


def _special_cases(tokenizer: HuggingFaceTokenizer) -> list[str]:
    """Added tokens in running text, with and without spaces: both sides must find them, and no more."""
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    return [text for token in added[:64] for text in (f"a{token}b", f"a {token} b", f"{token}{token}", token[:-1])]


def _first_difference(reference: Encoder, candidate: Encoder, texts: Sequence[str]) -> str | None:
    tokens, lengths = candidate.encode(texts)
    for text, ids in zip(texts, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True):
        if not np.array_equal(reference.encode([text])[0], ids):
            return text
    return None
