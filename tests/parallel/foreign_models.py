"""Tiny Hugging Face models, their batches, and plain training of them in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB, LENGTH, LR = 36, 10, 1e-2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "bos_token_id": 0}


def make(family: str, seed: int = 3, **more: Any) -> nn.Module:
    """Llama (untied), Qwen2 (biases, tied), Qwen3 (norms over heads), Phi3 (fused matrices), GPT2 (Conv1D), OPT."""
    import transformers

    torch.manual_seed(seed)
    if family == "GPT2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | drops | {"eos_token_id": None} | more))
    if family == "OPT":
        sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        sizes |= {"ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "dropout": 0.0}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes | {"eos_token_id": None} | more))
    special = {"Qwen2": {"tie_word_embeddings": True}, "Qwen3": {"head_dim": 8}}.get(family, {})
    config = getattr(transformers, f"{family}Config")(**SIZES | special | more)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def ids_of(step: int, rows: int = 4) -> Tensor:
    """The global batch [rows, LENGTH]."""
    return torch.randint(2, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(step))


def plain(family: str, steps: int) -> tuple[nn.Module, list[float], dict[str, Tensor]]:
    """torch's AdamW on the global batch: the model, its losses, the first step's gradients."""
    model = make(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    losses, gradients = [], {}
    for step in range(steps):
        loss = model(input_ids=ids_of(step), labels=ids_of(step)).loss
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return model, losses, gradients
