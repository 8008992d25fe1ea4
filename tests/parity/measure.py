"""Train a small model for some steps on one layout and bring back, by logical name, all that must not depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from megazero.data.batch import Batch
from megazero.engine.engine import Engine
from megazero.parallel.collectives import gather_objects
from megazero.parallel.context import local_places
from megazero.parallel.topology import Topology
from megazero.train.build import build_engine

STEPS, BATCH, SEQUENCE, VOCABULARY = 5, 8, 16, 100
LEARNING_RATE = 1e-3
EPSILON = 1e-6  # by Adam's usual 1e-8 an element's gradient of 1e-9, rounding noise, becomes a visible step
MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "vocab_size": VOCABULARY,
    "init_method_std": 0.2,  # gradients that matter everywhere
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes and the settings that must not change the numbers."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    cp: int = 1
    zero: int = 1
    micro_batch: int = 2
    schedule: str | None = None
    virtual: int | None = None
    cp_comm: str = "p2p"
    overlap: bool = True
    sequence: bool = False
    bucket_elements: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp * self.cp


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    """Of each step, by logical name, as the optimizer saw them (clipped)."""
    weights: dict[str, Tensor]
    """After the last step."""


def configure(layout: Layout, world_size: int, settings: dict[str, Any]) -> RunConfig:
    """`settings` are recipe keys, e.g. {"model.hidden_dropout": 0.1}."""
    sections: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "parallel": {
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "context_parallel_size": layout.cp,
            "pipeline_schedule": layout.schedule,
            "num_virtual_stages_per_pipeline_rank": layout.virtual,
            "cp_comm_type": layout.cp_comm,
            "sequence_parallel": layout.sequence,
            "zero_stage": layout.zero,
            "overlap_grad_reduce": layout.overlap,
            "overlap_param_gather": layout.overlap,
            "ddp_bucket_size": layout.bucket_elements,
        },
        "recompute": {},
        "data": {"mock_data": True, "seq_length": SEQUENCE},
        "training": {
            "micro_batch_size": layout.micro_batch,
            "global_batch_size": BATCH,
            "train_iters": STEPS,
            "precision": "fp32",
        },
        "optimizer": {"lr": LEARNING_RATE, "adam_eps": EPSILON, "clip_grad": 1.0, "lr_decay_style": "constant"},
    }
    for key, value in settings.items():
        section, name = key.split(".")
        sections[section][name] = value
    blank = RunConfig()
    return resolve(replace(blank, **{k: replace(getattr(blank, k), **v) for k, v in sections.items()}), world_size)


def global_batch(step: int) -> dict[str, Tensor]:
    """Random tokens, uneven masks (whole rows too), packed documents: the same on every layout."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    mask = (torch.rand(BATCH, SEQUENCE, generator=generator) < 0.7).float()
    mask[step % BATCH] = 0.0
    mask[(step + 1) % BATCH, 3:] = 0.0
    ends = torch.rand(BATCH, SEQUENCE, generator=generator) < 0.2
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "mask": mask, "documents": ends.long().cumsum(1)}


def train(layout: Layout, settings: dict[str, Any] | None = None, sabotage: str | None = None) -> Outcome | None:
    """Run on every rank of the layout; rank 0 gets the outcome. `sabotage` names a fault of tests/parity/faults.py."""
    settings = dict(settings or {})
    packed = settings.pop("packed", False)
    config = configure(layout, layout.world_size, settings)
    topology = Topology.build(
        pp=layout.pp, cp=layout.cp, tp=layout.tp, sequence_parallel=layout.sequence, cp_comm=layout.cp_comm
    )
    engine, forward = build_engine(config, topology, torch.device("cpu"))
    if sabotage:
        from tests.parity import faults

        faults.FAULTS[sabotage](engine)
    outcome = Outcome([], [], [], {})
    for step in range(STEPS):
        forward.step = step
        batches = local_batches(layout, topology, step, packed)
        count = float(sum(batch.loss_mask.sum() for batch in batches))
        result = engine.train_step(batches, forward.loss_sum, count, lr=LEARNING_RATE)
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
        grads = [(b, b.owned[0], b.reduced) for b in engine.zero.buckets]
        outcome.gradients.append(assemble(engine, grads))
    outcome.weights = assemble(engine, engine.zero.masters())
    return outcome if topology.rank == 0 else None


def local_batches(layout: Layout, topology: Topology, step: int, packed: bool) -> list[Batch]:
    """This rank's micro-batches of the global batch, cut as the loop cuts them."""
    logical, dp, cp = global_batch(step), topology.group("dp"), topology.group("cp")
    batches = []
    for first in range(dp.rank * layout.micro_batch, BATCH, dp.size * layout.micro_batch):
        rows = slice(first, first + layout.micro_batch)
        batch = Batch(
            tokens=logical["tokens"][rows],
            labels=logical["labels"][rows],
            loss_mask=logical["mask"][rows],
            position_ids=torch.arange(SEQUENCE).repeat(layout.micro_batch, 1),
            document_ids=logical["documents"][rows] if packed else None,
            sample_index=torch.arange(BATCH)[rows],
        )
        batches.append(batch.part(local_places(SEQUENCE, cp)) if cp.size > 1 else batch)
    return batches


def assemble(engine: Engine, buffers: Any) -> dict[str, Tensor]:
    """Logical tensors from all ranks' boxes, on rank 0; each element must come exactly once."""
    mine = [(n, s, b, t.clone()) for n, s, b, t in engine.zero.pieces(buffers, for_save=True)]
    whole: dict[str, Tensor] = {}
    for name, shape, box, part in [
        p for pieces in gather_objects(mine, engine.topology.group("world")) for p in pieces
    ]:
        target = box.of(whole.setdefault(name, torch.full(shape, torch.nan)))
        assert target.isnan().all(), f"{name} {box} came twice"
        target.copy_(part)
    assert not any(t.isnan().any() for t in whole.values()), "some elements are on no rank"
    return whole
