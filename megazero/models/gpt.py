"""The decoder-only language model.

    tokens [b, s] ─ embed_tokens ─ [dropout] ─ num_layers × Block ─ norm ─ lm_head ─ Σ loss, or logits

Parameter names are Hugging Face's for Llama (`model.layers.0.self_attn.q_proj.weight`, …, `lm_head.weight`). Built on
meta: parameters have specs but no memory until ZeRO takes the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megazero.config.schema import TransformerConfig
from megazero.config.validate import padded_vocab_size
from megazero.models.block import Block, hidden_dropout
from megazero.models.context import Context
from megazero.models.norm import Norm
from megazero.ops.attention import document_mask
from megazero.ops.dropout import Randomness
from megazero.ops.rope import rope_frequencies, rope_table
from megazero.parallel.cross_entropy import linear_cross_entropy
from megazero.parallel.sharding import ShardSpec, split
from megazero.parallel.tensor import VocabParallelEmbedding, gather_columns, parameter, replicated
from megazero.parallel.topology import Topology


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the model reads it."""

    tokens: Tensor
    """int64 [b, s]"""
    randomness: Randomness
    position_ids: Tensor | None = None
    """int64 [b, s], when they are not 0 … s-1: they restart inside packed samples when positions are reset."""
    document_ids: Tensor | None = None
    """[b, s]: packed documents that may not see each other."""


class Decoder(nn.Module):
    """Everything but the output projection: Inputs -> hidden states [b, s, h]."""

    def __init__(self, config: TransformerConfig, topology: Topology) -> None:
        super().__init__()
        assert config.vocab_size and config.kv_channels and config.max_position_embeddings
        self.config = config
        rows = padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by)
        h, std = config.hidden_size, config.init_method_std
        self.embed_tokens = VocabParallelEmbedding("model.embed_tokens", rows, h, topology, init_std=std)
        self.embed_positions: nn.Parameter | None = None
        if config.position_embedding_type == "learned_absolute":
            shape = (config.max_position_embeddings, h)
            self.embed_positions = replicated("model.embed_positions", shape, topology, init_std=std)
        self.layers = nn.ModuleList(Block(f"model.layers.{i}", config, topology) for i in range(config.num_layers))
        self.norm = Norm("model.norm", h, config, topology)

    def forward(self, inputs: Inputs) -> Tensor:
        x = self.embed_tokens(inputs.tokens)
        positions = inputs.position_ids
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)  # [1, s]
        if self.embed_positions is not None:
            x = x + F.embedding(positions, self.embed_positions)
        if self.training:
            x = hidden_dropout(x, self.config.hidden_dropout, "model.embed_tokens", inputs.randomness)
        context = self._context(inputs, positions)
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)

    def _context(self, inputs: Inputs, positions: Tensor) -> Context:
        config, rope = self.config, None
        if config.position_embedding_type == "rope":
            assert config.kv_channels
            rotary_dim = int(config.kv_channels * config.rotary_percent)
            scaling = config.rope_scaling_factor if config.use_rope_scaling else None
            frequencies = rope_frequencies(rotary_dim, config.rotary_base, scaling).to(inputs.tokens.device)
            rope = rope_table(positions, frequencies)
        mask = None if inputs.document_ids is None else document_mask(inputs.document_ids)
        return Context(rope, mask, inputs.randomness)


class OutputHead(nn.Module):
    """Projection onto the vocabulary, split over tp; `tied` is the embedding whose weight it shares, or None."""

    def __init__(self, config: TransformerConfig, topology: Topology, tied: VocabParallelEmbedding | None) -> None:
        super().__init__()
        assert config.vocab_size
        self.group, self.vocab_size = topology.group("tp"), config.vocab_size
        rows = padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by)
        shape = (rows, config.hidden_size)
        box = split(0, shape, self.group.rank, self.group.size)
        self.first = box.offset[0]
        if tied is not None:
            self.weight = tied.weight
        else:
            replicas = (self.group.ranks[self.group.rank],)
            spec = ShardSpec("lm_head.weight", shape, (box,), replicas, init_std=config.init_method_std)
            self.weight = parameter(spec)

    def forward(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        """hidden [b, s, h], labels and loss_mask [b, s] -> sum of the unmasked tokens' losses, fp32 scalar."""
        return linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.weight,
            labels.reshape(-1),
            loss_mask.reshape(-1),
            vocab_size=self.vocab_size,
            first_row=self.first,
            group=self.group,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [b, s, h] -> fp32 logits [b, s, vocab] on every tp rank. For inference: no gradients."""
        local = hidden.detach() @ self.weight.detach().t()
        return gather_columns(local, self.group)[..., : self.vocab_size].float()


class GPT(nn.Module):
    """`GPT(config, topology)`, config resolved. Returns the sum of token losses when labels are given, else logits."""

    def __init__(self, config: TransformerConfig, topology: Topology) -> None:
        super().__init__()
        self.model = Decoder(config, topology)
        tied = None if config.untie_embeddings_and_output_weights else self.model.embed_tokens
        self.lm_head = OutputHead(config, topology, tied)

    def forward(self, inputs: Inputs, labels: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        hidden = self.model(inputs)
        if labels is None:
            return self.lm_head.logits(hidden)
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.float32)
        return self.lm_head(hidden, labels, loss_mask)
