"""Models and data for the documents' blocks: small enough for fp16 on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH = 64, 16, 8


class Model(nn.Module):
    """Token ids [b, s] -> logits [b, s, VOCAB]."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(*(blocks or [nn.Linear(WIDTH, WIDTH), nn.Tanh()]))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, in fp32."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def batches(rows: int, rank: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels) [rows, LENGTH]: the next id is this one + 1."""
    generator = torch.Generator().manual_seed(rank)
    while True:
        ids = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
        yield ids, (ids + 1) % VOCAB


def train(engine: Any, steps: int, rank: int = 0) -> list[float]:
    """The losses of so many optimizer steps of an engine around `Model` on one batch, through forward, backward and
    step."""
    losses: list[float] = []
    ids, labels = next(batches(engine.train_micro_batch_size_per_gpu(), rank))
    for _ in range(steps * engine.gradient_accumulation_steps()):
        loss = loss_of(engine(ids.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert engine.global_steps == steps and engine.skipped_steps == 0
    return losses


def gpt2(folder: Path) -> Path:
    """A tiny GPT-2 in Hugging Face's format."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": WIDTH, "n_head": 2, "vocab_size": VOCAB, "n_positions": 32}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "tiny-gpt2")
    return folder / "tiny-gpt2"


def llama(folder: Path) -> Path:
    """A tiny Llama in Hugging Face's format, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=WIDTH, intermediate_size=32, num_attention_heads=2, vocab_size=VOCAB
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny-llama")
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *map(str, range(50)), "#", ":"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tiny-llama")
    return folder / "tiny-llama"


def alpaca(folder: Path) -> None:
    """alpaca.jsonl: rows like those of the dataset that the document loads from the hub."""
    rows = [{"instruction": f"{i} {i + 1}", "input": "", "output": f"{i + 2} {i + 3}"} for i in range(32)]
    (folder / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))


def examples(number: int) -> list[dict[str, Tensor]]:
    """input_ids and labels [LENGTH] of a language model, for a data set: every id is the one before + 1. The first
    label, which nothing predicts, is masked: the Trainer counts labels."""
    rows = [(torch.arange(LENGTH) + 5 * start) % VOCAB for start in range(number)]
    masked = torch.tensor([-100] + [0] * (LENGTH - 1))
    return [{"input_ids": row, "labels": torch.where(masked < 0, masked, row)} for row in rows]
