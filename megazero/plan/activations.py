"""Bytes of activations: what forward keeps for backward, and what a rank then holds of it at once.

After Korthikanti et al., arXiv 2205.05198 (34·s·b·h + 5·a·s²·b of a GPT block), for the operations of this model: no
dropout masks unless there is dropout, flash attention (no scores), grouped key/value heads, a gated MLP, and a loss
that never holds all logits. With n = b · s/cp tokens of e bytes an element on t tp ranks, r = t with sequence
parallelism, else 1, q = query width, k = key/value width (of this rank, copies included), f = MLP width:

    block     2·n·h·e/r    inputs of both norms      2·n·h·e   what the projections read: gathered, whole on each rank
              n·(q + 2k)·e q, k, v                   n·q·e     attention's result, and 4 bytes a token and head
              3·n·f·e/t    gate, up and their product (2·n·f·e/t without a gate)
    head      n·h·e/r      last norm's input         n·h·e     gradient by the last hidden state, computed in forward
              4·V/t·h      gradient of the output matrix, fp32, until backward

Korthikanti's 34·s·b·h/t counts the projections' inputs as kept in parts and gathered again in backward; here they are
kept whole (`--recompute-granularity selective --recompute-modules layernorm` computes them again). Tests compare these
formulas with what autograd saves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megazero.config.layout import padded_vocab_size
from megazero.config.schema import RunConfig
from megazero.plan.cut import StageCut
from megazero.plan.memory import WEIGHT_BYTES
from megazero.plan.schedule import Action, most_alive

_CHUNK_LOGITS = 1 << 27  # as parallel/cross_entropy.py on a GPU


@dataclass(frozen=True)
class BlockBytes:
    """Bytes that one block keeps of one micro-batch, by what can be computed again."""

    stream: float
    """Inputs of the two norms, in the residual stream."""
    norm_results: float
    """What the projections read."""
    qkv: float
    core: float
    """What attention itself keeps, beyond its inputs and its result."""
    attended: float
    """Attention's result, which the output projection reads."""
    mlp: float
    """Inside the MLP, its input aside."""
    masks: float
    """Of the dropout on the residual stream."""

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


class Activations:
    """The formulas for one configuration (resolved)."""

    def __init__(self, config: RunConfig) -> None:
        parallel, model = config.parallel, config.model
        self.config, self.model, self.recompute = config, model, config.recompute
        autocast = config.training.autocast != "none"
        self.element = 2 if autocast else WEIGHT_BYTES[config.training.precision]
        self.tp, self.cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        self.split = self.tp if parallel.sequence_parallel else 1
        self.tokens = config.training.micro_batch_size * config.data.seq_length / self.cp
        self.stream = self.tokens * model.hidden_size * self.element / self.split
        """Bytes of one hidden state [b, s/cp (/tp), h], as it goes from stage to stage."""
        self.whole = self.tokens * model.hidden_size * self.element

    def block(self) -> BlockBytes:
        """One block, nothing recomputed."""
        model, n, e = self.model, self.tokens, self.element
        assert model.kv_channels and model.num_query_groups and model.ffn_hidden_size
        heads, groups = model.num_attention_heads // self.tp, max(model.num_query_groups // self.tp, 1)
        q, k, ffn = heads * model.kv_channels, groups * model.kv_channels, model.ffn_hidden_size / self.tp
        statistic = 4 * n * (2 if model.normalization == "LayerNorm" else 1)
        exchanged = self.cp > 1 and self.config.parallel.cp_comm_type == "a2a"
        kv = k * (self.cp // math.gcd(groups, self.cp) if exchanged else 1)
        core = 4.0 * n * heads  # log-sum-exp
        if model.attention_dropout:
            scores = n * self.config.data.seq_length * heads
            core = scores * (4 + 1 + e) + n * e * 3 * q  # probabilities, mask, dropped ones; inputs laid out anew
        if exchanged:
            core += n * q * e  # the result before it is exchanged back
        if model.qk_layernorm:
            core += n * (q + k) * e + (heads + groups) * statistic
        return BlockBytes(
            stream=2 * self.stream + 2 * statistic / self.split,
            norm_results=2 * self.whole,
            qkv=n * (q + 2 * kv) * e,
            core=core,
            attended=n * q * e,
            mlp=n * ffn * e * (3 if model.activation == "swiglu" else 2),
            masks=2 * self.stream / e if model.hidden_dropout else 0.0,
        )

    def kept(self, stage: StageCut) -> float:
        """Bytes that one micro-batch keeps from its forward through this stage to its backward."""
        return self._blocks(len(stage.layers)) + self._ends(stage)

    def working(self, stage: StageCut) -> float:
        """Bytes that come on top while one micro-batch is worked on: what is being recomputed, and the largest
        intermediate results, which are estimated: gradients inside an MLP, or a chunk of logits with its gradient."""
        block, recompute = self.block(), self.recompute
        again = 0.0
        if recompute.recompute_granularity == "full" and stage.layers:
            uniform = recompute.recompute_method == "uniform"
            again = block.total * (min(recompute.recompute_num_layers or 1, len(stage.layers)) if uniform else 1)
        elif recompute.recompute_granularity == "selective":
            parts = {"core_attn": block.core, "mlp": block.mlp, "layernorm": block.norm_results / 2}
            again = max((parts[name] for name in recompute.recompute_modules), default=0.0)
        return again + max(block.mlp + self.whole if stage.layers else 0.0, self._chunk() if stage.has_loss else 0.0)

    def peak(self, stages: Sequence[StageCut], actions: Sequence[Action], micro_batches: int) -> dict[str, float]:
        """Components for a rank that holds these stages and does these actions in a step."""
        weights = {stage.stage: self.kept(stage) for stage in stages}
        components = {
            "activations": most_alive(actions, weights),
            "working memory": max(self.working(stage) for stage in stages),
        }
        if self.config.parallel.pipeline_model_parallel_size > 1:
            # torch's stages receive each micro-batch's hidden state, and its gradient, into a buffer of its own
            received = sum((not stage.has_embedding) + (not stage.has_loss) for stage in stages)
            components["pipeline buffers"] = micro_batches * self.stream * received
        return components

    def _blocks(self, layers: int) -> float:
        block, recompute = self.block(), self.recompute
        if recompute.recompute_granularity == "full":
            step = recompute.recompute_num_layers or 1
            uniform = recompute.recompute_method == "uniform"
            chunks = math.ceil(layers / step) if uniform else min(step, layers)
            kept = 0 if uniform else layers - chunks
            divided = self.tp if recompute.partition_activations and self.split == 1 else 1
            return chunks * (0.0 if recompute.cpu_checkpointing else self.stream / divided) + kept * block.total
        modules = recompute.recompute_modules if recompute.recompute_granularity == "selective" else ()
        dropped = block.core if "core_attn" in modules else 0.0
        if "mlp" in modules:
            dropped += block.mlp + (block.norm_results / 2 - self.stream)  # the input stays, before it is gathered
        if "layernorm" in modules:
            dropped += block.norm_results / 2 + (self.stream if "mlp" in modules else block.norm_results / 2)
        return layers * (block.total - dropped)

    def _ends(self, stage: StageCut) -> float:
        """Embedding, loss head, and what the pipeline itself keeps of a stage."""
        model, n = self.model, self.tokens
        total = 8 * n
        if model.position_embedding_type == "rope":
            assert model.kv_channels
            total += 4 * (n / self.config.training.micro_batch_size) * int(model.kv_channels * model.rotary_percent)
        if stage.has_embedding and model.hidden_dropout:
            total += self.stream / self.element
        if stage.has_loss:
            assert model.vocab_size is not None
            rows = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by) / self.tp
            total += self.stream + self.whole + 4 * rows * model.hidden_size + 4 * n / self.split
        if not stage.has_loss:
            total += self.stream  # the stage's result, kept by the runtime
        if not stage.has_embedding and stage.layers:
            total -= min(self.stream, self._blocks(1))  # the first block's input is the buffer that it came in
        return total

    def _chunk(self) -> float:
        """A chunk of logits in fp32, with the 16-bit products that it comes from and goes into."""
        assert self.model.vocab_size is not None
        rows = padded_vocab_size(self.model.vocab_size, self.model.make_vocab_size_divisible_by) / self.tp
        elements = min(max(_CHUNK_LOGITS, 16 * rows), self.tokens * rows)
        return elements * (4 + 2 * self.element) + 4 * rows * self.model.hidden_size
