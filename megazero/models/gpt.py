"""The decoder-only language model.

    tokens [b, s] ─ embed_tokens ─ [dropout] ─ num_layers × Block ─ norm ─ lm_head ─ Σ loss, or logits

Parameter names are Hugging Face's for Llama (`model.layers.0.self_attn.q_proj.weight`, …, `lm_head.weight`). Built on
meta: parameters have specs but no memory until ZeRO takes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megazero.config.schema import TransformerConfig
from megazero.config.validate import padded_vocab_size
from megazero.models.block import Block, hidden_dropout
from megazero.models.context import Context
from megazero.models.norm import Norm
from megazero.models.stack import run_blocks
from megazero.ops.attention import document_mask
from megazero.ops.dropout import Randomness
from megazero.ops.rope import rope_frequencies, rope_table
from megazero.parallel.context import ring_document_mask
from megazero.parallel.cross_entropy import linear_cross_entropy
from megazero.parallel.recompute import KEEP_ALL, Recompute
from megazero.parallel.sharding import spec_of
from megazero.parallel.tensor import (
    VocabParallelEmbedding,
    enter_tensor_parallel,
    gather_columns,
    own_part_of_sequence,
    replicated,
    vocabulary_rows,
)
from megazero.parallel.topology import AxisGroup, Topology

EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the model reads it."""

    tokens: Tensor
    """int64 [b, s]"""
    randomness: Randomness
    position_ids: Tensor | None = None
    """int64 [b, s], when they are not 0 … s-1: they restart inside packed samples when positions are reset."""
    document_ids: Tensor | None = None
    """[b, s]: packed documents that may not see each other. Of the whole sequence, also under context parallelism."""
    places: Tensor | None = None
    """int64 [s/cp], under context parallelism: where in the sequence the tokens here stand. None: all of it is here,
    whatever the topology."""


@dataclass(frozen=True)
class Part:
    """The part of the model that one pipeline stage holds."""

    layers: range
    has_embedding: bool = True
    has_loss: bool = True
    """With the last norm and the output projection."""
    both_ends_here: bool = False
    """This process holds the first and the last stage (the V schedules), so that tied weights are one parameter."""


class Decoder(nn.Module):
    """Embedding, blocks and last norm, or this part of them."""

    def __init__(
        self,
        config: TransformerConfig,
        topology: Topology,
        part: Part,
        tied: AxisGroup | None,
        recompute: Recompute = KEEP_ALL,
    ) -> None:
        super().__init__()
        assert config.vocab_size and config.kv_channels and config.max_position_embeddings
        self.config, self.topology, self.recompute = config, topology, recompute
        h, std = config.hidden_size, config.init_method_std
        self.embed_tokens: VocabParallelEmbedding | None = None
        self.embed_positions: nn.Parameter | None = None
        if part.has_embedding:
            self.embed_tokens = VocabParallelEmbedding(
                EMBEDDING, vocabulary(config), h, topology, init_std=std, copies=tied
            )
            if config.position_embedding_type == "learned_absolute":
                shape = (config.max_position_embeddings, h)
                self.embed_positions = replicated("model.embed_positions", shape, topology, init_std=std)
        self.layers = nn.ModuleDict(
            {str(i): Block(f"model.layers.{i}", config, topology, recompute) for i in part.layers}
        )
        self.norm = Norm("model.norm", h, config, topology) if part.has_loss else None

    def forward(self, inputs: Inputs, hidden: Tensor | None) -> Tensor:
        """`hidden` [b, s (/tp), h] is what the stage before gave; None where the embedding is."""
        places = inputs.places
        if places is None:
            places = torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device)
        positions = places.unsqueeze(0) if inputs.position_ids is None else inputs.position_ids  # [b or 1, s]
        context = self._context(inputs, places, positions)
        x = self._embed(inputs.tokens, positions, context) if hidden is None else hidden
        x = run_blocks(list(self.layers.values()), x, context, self.recompute)
        return x if self.norm is None else self.norm(x)

    def _embed(self, tokens: Tensor, positions: Tensor, context: Context) -> Tensor:
        assert self.embed_tokens is not None, "this stage needs the hidden state of the one before"
        x: Tensor = self.embed_tokens(tokens)
        if self.embed_positions is not None:
            x = x + F.embedding(own_part_of_sequence(positions, self.topology), self.embed_positions)
        if self.training:
            x = hidden_dropout(x, self.config.hidden_dropout, EMBEDDING, context)
        return x

    def _context(self, inputs: Inputs, places: Tensor, positions: Tensor) -> Context:
        config, rope = self.config, None
        if config.position_embedding_type == "rope":
            assert config.kv_channels
            rotary_dim = int(config.kv_channels * config.rotary_percent)
            scaling = config.rope_scaling_factor if config.use_rope_scaling else None
            frequencies = rope_frequencies(rotary_dim, config.rotary_base, scaling).to(inputs.tokens.device)
            rope = rope_table(positions, frequencies)
        cp = None if inputs.places is None else self.topology.group("cp")
        mask = None
        if inputs.document_ids is not None:
            ring = cp is not None and self.topology.cp_comm == "p2p"
            mask = ring_document_mask(inputs.document_ids, places, cp) if ring else document_mask(inputs.document_ids)
        stream_places = own_part_of_sequence(places.unsqueeze(0), self.topology).squeeze(0)
        return Context(rope, mask, inputs.randomness, places, stream_places, cp)


class OutputHead(nn.Module):
    """Projection onto the vocabulary, split over tp. `weight` is the embedding's when they are tied."""

    def __init__(self, config: TransformerConfig, topology: Topology, weight: nn.Parameter) -> None:
        super().__init__()
        assert config.vocab_size
        self.topology, self.group, self.vocab_size = topology, topology.group("tp"), config.vocab_size
        self.weight, self.first = weight, spec_of("", weight).boxes[0].offset[0]

    def forward(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        """hidden [b, s (/tp), h], labels and loss_mask [b, s] -> sum of the unmasked tokens' losses, fp32 scalar."""
        hidden = enter_tensor_parallel(hidden, self.topology)
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
        local = enter_tensor_parallel(hidden.detach(), self.topology) @ self.weight.detach().t()
        return gather_columns(local, self.group)[..., : self.vocab_size].float()


class GPT(nn.Module):
    """`GPT(config, topology)`, config resolved: the whole model, or with `part` one stage of a pipeline.

    Args:
        tied: the embedding's weight that the output projection shares, if another part in this process holds it.
        recompute: what of the blocks is computed again in backward.
    """

    def __init__(
        self,
        config: TransformerConfig,
        topology: Topology,
        part: Part | None = None,
        tied: nn.Parameter | None = None,
        recompute: Recompute = KEEP_ALL,
    ) -> None:
        super().__init__()
        part = part or Part(range(config.num_layers))
        is_tied, ends = not config.untie_embeddings_and_output_weights, None
        if is_tied and part.has_embedding != part.has_loss and not part.both_ends_here:
            ends = topology.members("pp", (0, topology.size("pp") - 1))
        self.model = Decoder(config, topology, part, ends, recompute)
        self.lm_head: OutputHead | None = None
        if part.has_loss:
            own = self.model.embed_tokens
            if is_tied and (own is not None or tied is not None):
                weight = own.weight if own is not None else tied
            else:
                name = f"{EMBEDDING}.weight" if is_tied else "lm_head.weight"
                std, h = config.init_method_std, config.hidden_size
                weight = vocabulary_rows(name, vocabulary(config), h, topology, init_std=std, copies=ends)
            assert weight is not None
            self.lm_head = OutputHead(config, topology, weight)

    def forward(
        self,
        inputs: Inputs,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Sum of token losses when labels are given, else logits; hidden states from a part without the loss."""
        x = self.model(inputs, hidden)
        if self.lm_head is None:
            return x
        if labels is None:
            return self.lm_head.logits(x)
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.float32)
        return self.lm_head(x, labels, loss_mask)


def build_parts(
    config: TransformerConfig, topology: Topology, parts: Sequence[Part], recompute: Recompute = KEEP_ALL
) -> list[GPT]:
    """This rank's stages of the model, ascending. Where both ends are here, tied weights are one parameter."""
    built: list[GPT] = []
    ends = any(part.has_embedding for part in parts) and any(part.has_loss for part in parts) and len(parts) > 1
    for part in parts:
        first = built[0].model.embed_tokens if built else None
        tied = first.weight if ends and part.has_loss and first is not None else None
        built.append(GPT(config, topology, replace(part, both_ends_here=ends), tied, recompute))
    return built


def vocabulary(config: TransformerConfig) -> int:
    """Rows of the embedding, padding included."""
    assert config.vocab_size
    return padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by)
