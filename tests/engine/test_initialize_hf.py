"""initialize() around tiny Hugging Face models, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.fronts import LR, assert_like, config_of, engine_of, hf_model


def check_hugging_face(kind: str, stages: list[int]) -> None:
    reference = hf_model(kind)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR)
    tokens = torch.randint(0, 40, (3, 4, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in tokens:
        optimizer.zero_grad()
        loss = reference(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    for stage in stages:
        engine = engine_of(hf_model(kind), config_of(stage, clip=0.5) | {"train_batch_size": 4})
        group = engine.topology.group("dp")
        for batch, wanted in zip(tokens, losses, strict=True):
            mine = batch.chunk(group.size)[group.rank]
            output = engine(input_ids=mine, labels=mine)
            engine.backward(output.loss)
            engine.step()
            assert engine.last is not None and engine.last.loss == pytest.approx(wanted, rel=1e-6)
        assert_like(engine, reference)
        state = engine.state_dict()
        assert state.keys() == reference.state_dict().keys()
        assert all(torch.allclose(value, state[name], atol=2e-5) for name, value in reference.state_dict().items())
        assert engine.config.vocab_size == 40 and engine.can_generate()
        with torch.no_grad():
            logits = engine.eval()(tokens[0]).logits
        torch.testing.assert_close(logits, reference.eval()(tokens[0]).logits.detach(), atol=1e-4, rtol=1e-4)
        reference.train()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hugging_face_models(ranks: Any, kind: str) -> None:
    ranks.run(check_hugging_face, 2, kind, [0, 1, 2, 3])


def test_auto_is_settled_from_the_model() -> None:
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    engine = engine_of(hf_model("llama"), auto)
    parallel = engine.settings.parallel
    assert (parallel.ddp_bucket_size, parallel.stage3_prefetch_bucket_size) == (256, 230)
    assert parallel.stage3_param_persistence_threshold == 160
    assert engine.settings.training.precision == "fp32" and engine.train_batch_size() == 1
