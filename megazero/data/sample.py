"""One training sample: S + 1 tokens become inputs and labels, and what the model must know of document boundaries.

text       a b c | d e f g          S + 1 = 7 tokens of two documents
tokens     a b c   d e f            labels  b c d e f g
documents  0 0 0   1 1 1            positions with reset  0 1 2 0 1 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """Arrays of length S, the sequence length."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    document_ids: NDArray[np.int32] | None
    """0, 1, … in the order of the documents in the sample; only with reset_attention_mask."""


class SampleSource(Protocol):
    """A dataset: a length and samples by index, in their final order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class SampleOptions:
    """What to make of document boundaries; the fields are those of DataConfig."""

    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    eod: int | None = None
    """Id of the end-of-document token; a document also ends after it, wherever it stands."""


def make_sample(text: NDArray, first_tokens: NDArray[np.int64], options: SampleOptions) -> Sample:
    """`text` [S + 1] token ids; `first_tokens`: positions in it where a document begins (0 need not be listed)."""
    text = text.astype(np.int64)
    tokens, labels = text[:-1], text[1:]
    size = len(tokens)
    loss_mask = np.ones(size, np.float32)
    positions = np.arange(size, dtype=np.int64)
    document_ids = None
    is_eod = tokens == options.eod if options.eod is not None else np.zeros(size, bool)
    if options.eod_mask_loss:
        loss_mask[is_eod] = 0.0
    if options.reset_position_ids or options.reset_attention_mask:
        begins = np.zeros(size, bool)
        begins[first_tokens[first_tokens < size]] = True
        begins[1:] |= is_eod[:-1]
        begins[0] = False
        if options.reset_position_ids:
            positions -= np.maximum.accumulate(np.where(begins, positions, 0))
        if options.reset_attention_mask:
            document_ids = np.cumsum(begins, dtype=np.int32)
    return Sample(tokens, labels, loss_mask, positions, document_ids)
