"""Answers drawn from an actor, the same ones on any number of ranks.

    prompts [b, p], padded on the left ─ the module's own generate ─► sequences [b, p + a]
    token = argmax(logits / temperature + g),  g = -log(-log u),  u = hash(seed, step, sample, position, token id)

Adding Gumbel noise to logits and taking the largest draws from their softmax (Gumbel 1954; Maddison et al. 2014), and
noise that is a hash of what it is for, not of which rank asks, makes the draw a property of the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.engine.engine import Engine
from megazero.inference.generation import Generate
from megazero.ops.dropout import Randomness, hashed
from megazero.parallel.collectives import all_gather
from megazero.parallel.topology import AxisGroup
from megazero.rlhf.padding import first


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    pad: int
    stops: tuple[int, ...]
    """Tokens that end an answer. The first of them is its last token."""
    max_answer_seq_len: int = 256
    """Most tokens of an answer."""
    temperature: float = 1.0
    """What logits are divided by; 0 takes the likeliest token."""
    seed: int = 1234

    @property
    def divisor(self) -> float:
        """What logits are divided by where a log-probability is asked for."""
        return self.temperature or 1.0


@dataclass(frozen=True)
class Rollout:
    """Answers to prompts of length p; the longest one has a tokens."""

    sequences: Tensor
    """int64 [b, p + a]: prompt, answer, pads."""
    answer_mask: Tensor
    """int64 [b, a]: 1 for the answer's tokens, the one that ends it too."""
    log_probs: Tensor
    """fp32 [b, a]: of each token when it was drawn; 0 outside the mask."""


def roll_out(actor: Engine, prompts: Tensor, mask: Tensor, sampling: Sampling, step: int) -> Rollout:
    """Draw an answer to each prompt. Collective over the ranks that see different prompts.

    Args:
        prompts: int64 [b, p], padded on the left.
        mask: 1 for the prompts' tokens [b, p].
        step: another one gives other answers.

    Raises ConfigError for a module that cannot generate, or not that much.
    """
    module, width = actor.module, prompts.shape[1]
    generate = _generate_of(actor)
    _check_length(module, int(mask.sum(1).max()), sampling.max_answer_seq_len)
    noise = Noise(sampling, step, width, *sample_keys(prompts, mask, actor.topology.group("dp")))
    with actor.precision.forward(), _plain_settings(module):
        sequences = generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=sampling.max_answer_seq_len,
            do_sample=False,
            num_beams=1,
            logits_processor=_processors(noise),
            pad_token_id=sampling.pad,
            eos_token_id=list(sampling.stops) or None,
        )
    answers = sequences[:, width:]
    if len(noise.log_probs) < answers.shape[1]:
        raise ConfigError(
            f"{type(module).__name__}.generate() calls no logits_processor, through which answers are drawn. Let it "
            "call each one with (ids so far, next token's logits) and take the argmax of the result."
        )
    answer_mask = mask_of_answers(answers, sampling)
    log_probs = torch.stack(noise.log_probs[: answers.shape[1]], 1)
    return Rollout(sequences, answer_mask, torch.where(answer_mask != 0, log_probs, 0.0))


def mask_of_answers(answers: Tensor, sampling: Sampling) -> Tensor:
    """1 up to the first stop token and for it, else up to the first pad; the first token always: [b, a] -> [b, a]."""
    stops = torch.isin(answers, torch.tensor(sampling.stops, dtype=answers.dtype, device=answers.device))
    stop = first(stops)
    end = torch.where(stop < answers.shape[1], stop + 1, first(answers == sampling.pad)).clamp(min=1)
    return (torch.arange(answers.shape[1], device=answers.device) < end.unsqueeze(1)).long()


def sample_keys(prompts: Tensor, mask: Tensor, group: AxisGroup) -> tuple[Tensor, Tensor]:
    """What tells a sample from all others of a step, wherever it is: (crc32 of its prompt without padding, how many
    samples before it, in the order of ranks and rows, have that prompt too), int64 [b] each. Collective."""
    texts = [
        row[real].numpy().astype("<i8").tobytes() for row, real in zip(prompts.cpu(), mask.bool().cpu(), strict=True)
    ]
    own = torch.tensor([crc32(text) for text in texts], device=prompts.device)
    rows = all_gather(torch.tensor([len(texts)], device=own.device), group, 0).tolist()
    padded = torch.zeros(max(rows), dtype=own.dtype, device=own.device)
    padded[: len(texts)] = own
    everyone = all_gather(padded, group, 0).view(len(rows), -1).tolist()
    before = Counter(crc for rank in range(group.rank) for crc in everyone[rank][: rows[rank]])
    numbers = []
    for crc in own.tolist():
        numbers.append(before[crc])
        before[crc] += 1
    return own, torch.tensor(numbers, device=prompts.device)


class Noise:
    """Called by generate() with the ids so far [b, s] and the next token's logits [b, V]: what to take the argmax of.
    Keeps the log-probability [b] of each token that this draws."""

    def __init__(self, sampling: Sampling, step: int, width: int, crc: Tensor, occurrence: Tensor) -> None:
        self.sampling, self.width = sampling, width
        self.crc, self.occurrence = crc.unsqueeze(1), occurrence.unsqueeze(1)
        self.key = Randomness(sampling.seed, step, crc).key("rollout")
        self.log_probs: list[Tensor] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = logits.float() / self.sampling.divisor
        noisy = logits if self.sampling.temperature == 0 else logits.double() + self._gumbel(ids, logits.shape[1])
        chosen = noisy.argmax(1, keepdim=True)
        self.log_probs.append((logits.gather(1, chosen) - logits.logsumexp(1, keepdim=True)).squeeze(1))
        return noisy

    def _gumbel(self, ids: Tensor, vocabulary: int) -> Tensor:
        """fp64 [b, V]."""
        position = torch.tensor(ids.shape[1] - self.width)
        tokens = torch.arange(vocabulary, device=ids.device)
        bits = hashed(self.key, [self.crc, self.occurrence, position, tokens], ids.device)
        return -(-((bits.double() + 0.5) / 2**32).log()).log()


def _processors(noise: Noise) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList([noise])


def _generate_of(actor: Engine) -> Generate:
    module, zero = actor.module, actor.zero
    if not callable(getattr(module, "generate", None)):
        raise ConfigError(
            f"the actor's module, {type(module).__name__}, has no generate(), which draws answers. Take one of "
            "Hugging Face's causal language models, or give it a generate() with their arguments."
        )
    together = zero.gatherer is not None and zero.group.size > 1
    return Generate(module, actor.topology, actor.device, limit=None, together=together)


def _check_length(module: nn.Module, prompt: int, answer: int) -> None:
    room = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if isinstance(room, int) and prompt + answer > room:
        raise ConfigError(
            f"answers of up to {answer} tokens (max_answer_seq_len) to a prompt of {prompt}: {prompt + answer} in all, "
            f"and {type(module).__name__} has {room} positions. Lower max_answer_seq_len, or shorten the prompts."
        )


@contextmanager
def _plain_settings(module: nn.Module) -> Iterator[None]:
    """Inside, no generation_config of the module's own (a repetition penalty, say) changes what is drawn: training
    takes the model's probabilities as they are."""
    holders = [(part, part.generation_config) for part in module.modules() if "generation_config" in vars(part)]
    for part, config in holders:
        part.generation_config = type(config)()
    try:
        yield
    finally:
        for part, config in holders:
            part.generation_config = config
