"""The blocks about pipelines, on 4 ranks: 2 stages, 2 replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from tests.harness import Ranks
from tests.seeds.blocks import place, run
from tests.seeds.tiny import LENGTH, VOCAB, WIDTH, loss_of


class EmbeddingLayer(nn.Embedding):
    pass


class TransformerBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = (
            num_heads,
            nn.Linear(hidden_size, 3 * hidden_size),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(2, -2).transpose(1, 2).unbind(-2)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class LMHead(nn.Linear):
    pass


def model_of_6_2() -> tuple[Any, dict[str, Any]]:
    """The block's model, and its configuration."""
    from deepspeed.pipe import PipeDataParallelTopology

    names = run(
        "S2 6.2",
        {
            "EmbeddingLayer": EmbeddingLayer,
            "TransformerBlock": TransformerBlock,
            "LMHead": LMHead,
            "cross_entropy_loss": loss_of,
            "PipeDataParallelTopology": PipeDataParallelTopology,
        },
    )
    return names["GPT2PipelineModel"](4, WIDTH, 2, VOCAB), names["pipeline_config"]


def data() -> list[tuple[Tensor, Tensor]]:
    """Samples (ids, labels) [LENGTH]."""
    ids = torch.arange(64 * LENGTH).view(64, LENGTH) * 7 % VOCAB
    return [(row, (row + 1) % VOCAB) for row in ids]


def check_6_2(folder: str) -> list[float]:
    with place(folder):
        import deepspeed

        torch.manual_seed(0)
        model, config = model_of_6_2()
        assert model.topology.sizes["pp"] == 2 and model.topology.sizes["dp"] == 2
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with pytest.raises(ConfigError, match=r"64(.|\n)*32"):
            deepspeed.initialize(model=model, config=config | {"train_batch_size": 64}, optimizer=optimizer)
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, training_data=data())
        losses = [engine.train_batch().item() for _ in range(3)]
        assert engine.global_steps == 3 and losses[-1] < losses[0]
        return losses


def check_6_3(folder: str) -> None:
    with place(folder):
        import deepspeed

        torch.manual_seed(0)
        model, _ = model_of_6_2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        given = {"deepspeed": deepspeed, "pipeline_model": model, "num_steps": 2, "optimizer": optimizer}
        engine = run("S2 6.3", given | {"training_data": data()})["model_engine"]
        assert engine.global_steps == 2
        micro_batches = [(torch.stack([ids] * 2), torch.stack([labels] * 2)) for ids, labels in data()[:8]]
        assert engine.eval_batch(iter(micro_batches)).item() > 0


def test_pipeline_module(ranks: Ranks, tmp_path: Path) -> None:
    losses = ranks.run(check_6_2, 4, str(tmp_path))
    assert losses == [losses[0]] * 4  # every stage and replica knows the mean


def test_pipeline_with_zero_1(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_6_3, 4, str(tmp_path))


def check_without_data(folder: str) -> None:
    with place(folder):
        import deepspeed

        model, config = model_of_6_2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        with pytest.raises(ValueError, match="training_data"):
            engine.train_batch()
        engine, *_ = deepspeed.initialize(model=model, config=config, training_data=data())
        with pytest.raises(ValueError, match="optimizer"):
            engine.train_batch()
        assert dist.get_world_size() == 4


def test_train_batch_without_data_or_optimizer_says_so(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_without_data, 4, str(tmp_path))
