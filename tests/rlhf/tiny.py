"""Tiny models, their tokenizer, and the four engines of PPO over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import megazero
from megazero.rlhf import PPOConfig, PPOTrainer, RewardModel, RLHFEngine

PAD, BOS, EOS, VOCAB = 0, 1, 2, 24
PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7], [0, 0, 0, 0, 9], [0, 0, 5, 6, 7]])
"""Of different lengths; the first and the last are the same."""
FAMILIES = ["gpt2", "llama", "opt"]


def language_model(family: str = "llama", seed: int = 0, **changed: Any) -> Any:
    """A causal language model of Hugging Face's, with weights large enough to have opinions."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"hidden_size": 16, "max_position_embeddings": 32, "bos_token_id": BOS, "eos_token_id": EOS} | changed
    if family == "gpt2":
        dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, initializer_range=0.2))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, initializer_range=0.2))
    return OPTForCausalLM(
        OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=8, pad_token_id=PAD, dropout=0.0, init_std=0.2)
    )


def tokenizer(pad: str = "<pad>") -> Any:
    """Whole words: the numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(4, VOCAB))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
    )


class Share(nn.Module):
    """A score made by hand: the share of one token among a row's."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token, self.scale = token, nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.scale * ((input_ids == self.token) * attention_mask).sum(1) / attention_mask.sum(1)


def engine(model: nn.Module, *, trained: bool = False, stage: int = 0, **settings: Any) -> Any:
    """An engine of it; `settings` go into its configuration."""
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    if trained:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-5}}
    return megazero.initialize(model=model, config=config | settings)[0]


def engines(family: str = "llama", *, actor: Any = None, reward: nn.Module | None = None, **settings: Any) -> Any:
    """The four engines of PPO. The reference differs from the actor, so that its divergence is not zero."""
    words = tokenizer()
    return RLHFEngine(
        actor=engine(language_model(family, 0) if actor is None else actor, trained=True, **settings),
        critic=engine(reward_model(family, 1), trained=True, **settings),
        ref=engine(language_model(family, 2), **settings),
        reward=engine(reward_model(family, 3) if reward is None else reward, **settings),
        tokenizer=words,
    )


def reward_model(family: str, seed: int) -> RewardModel:
    model = language_model(family, seed)
    return RewardModel(model, tokenizer())


def trainer(family: str = "llama", config: PPOConfig | None = None, **settings: Any) -> PPOTrainer:
    return PPOTrainer(engines(family, **settings), config or PPOConfig(max_answer_seq_len=6))
