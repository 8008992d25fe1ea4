"""Synthetic tokens that can be learned: sample i is a function of (seed, i), of nothing else.

A fixed cycle through the vocabulary is followed for about ten tokens, then left by a jump to a new place (small places
are likelier), so loss falls first to the entropy of the skewed tokens, then towards that of the jumps alone. Every
fourth jump begins a document.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megazero.data.sample import Sample, SampleOptions, make_sample

JUMP = 0.1
"""Probability of a jump at each token."""
DOCUMENT = 0.25
"""Share of the jumps that begin a document."""


class MockDataset:
    """`num_samples` samples. `mask_fraction` of the labels, drawn like the tokens, count for nothing in the loss."""

    def __init__(
        self,
        *,
        num_samples: int,
        seq_length: int,
        vocab_size: int,
        seed: int,
        part: int,
        options: SampleOptions,
        mask_fraction: float = 0.0,
    ) -> None:
        """`part`: 0 train, 1 validation, 2 test; they share the cycle and no sample."""
        self.num_samples, self.seq_length, self.seed, self.part = num_samples, seq_length, seed, part
        self.options, self.mask_fraction = options, mask_fraction
        cycle = np.random.PCG64(np.random.SeedSequence([seed]))
        self._cycle = np.argsort(cycle.random_raw(vocab_size), kind="stable")

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        jump, place, masked = self._draw(index)
        is_jump = jump < JUMP
        is_jump[0] = True
        steps = np.arange(self.seq_length + 1)
        last_jump = np.maximum.accumulate(np.where(is_jump, steps, 0))
        landed = (place**3 * len(self._cycle)).astype(np.int64)
        text = self._cycle[(landed[last_jump] + steps - last_jump) % len(self._cycle)]
        begins = np.flatnonzero(jump < JUMP * DOCUMENT)
        begins = begins[begins > 0]
        if self.options.eod is not None:
            text[begins - 1] = self.options.eod
        sample = make_sample(text, begins, self.options)
        sample.loss_mask[masked[:-1] < self.mask_fraction] = 0.0
        return sample

    def _draw(self, index: int) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1), [3, S + 1], from raw bits: numpy promises those for ever."""
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, self.part, index]))
        raw = bits.random_raw(3 * (self.seq_length + 1)) >> np.uint64(11)
        return (raw.astype(np.float64) * 2.0**-53).reshape(3, -1)
