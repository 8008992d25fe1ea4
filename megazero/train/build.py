"""From a resolved configuration and a topology to an engine: the model, or this rank's stages of it, and how a batch
goes through. The order of application explains it: parts on meta → ZeRO takes them → compile → pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from megazero.config.schema import RunConfig
from megazero.data.batch import Batch
from megazero.engine.engine import DTYPES, Engine
from megazero.models.block import Block
from megazero.models.gpt import Inputs, Part, build_parts
from megazero.ops.dropout import Randomness
from megazero.parallel.context import local_places
from megazero.parallel.pipeline import LocalStage, Pipeline
from megazero.parallel.recompute import Recompute
from megazero.parallel.topology import Topology
from megazero.plan.cut import StageCut, cut_layers


class Forward:
    """How a micro-batch goes through the model or through one of its stages; `step` is dropout's, set at each step."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        self.seed, self.reset_positions, self.step = config.training.seed, config.data.reset_position_ids, 0
        cp = topology.group("cp")
        self.places = local_places(config.data.seq_length, cp).to(device) if cp.size > 1 else None

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the batch's token losses."""
        tensors = {name: value for name, value in vars(batch).items() if value is not None}
        return self.through(model, tensors, None)

    def through(self, model: nn.Module, inputs: Mapping[str, Tensor], hidden: Tensor | None) -> Tensor:
        """A Batch's tensors (and a stage's hidden state) through the model: hidden state, loss sum, or, without labels,
        logits."""
        tokens = inputs["tokens"]
        positions = inputs.get("position_ids") if self.reset_positions else None
        sample = inputs.get("sample_index", torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device))
        places = self.places if "labels" in inputs else None  # without labels the whole sequence is here
        randomness = Randomness(self.seed, self.step, sample)
        model_inputs = Inputs(tokens, randomness, positions, inputs.get("document_ids"), places)
        result: Tensor = model(model_inputs, inputs.get("labels"), inputs.get("loss_mask"), hidden)
        return result


def build_engine(config: RunConfig, topology: Topology, device: torch.device) -> tuple[Engine, Forward]:
    """The engine of this rank's part of the model, and how batches go through it."""
    forward = Forward(config, topology, device)
    cut = cut_layers(config)
    mine = [stage for stage in cut if stage.rank == topology.group("pp").rank]
    parts = [Part(stage.layers, stage.has_embedding, stage.has_loss) for stage in mine]
    built = build_parts(config.model, topology, parts, Recompute.of(config, topology))
    module = built[0] if len(built) == 1 else nn.ModuleList(built)
    blocks = {name: block for name, block in module.named_modules() if isinstance(block, Block)}
    engine = Engine(module, topology, config, device, list(blocks))
    if config.training.compile:
        for block in blocks.values():
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]  # hooks stay outside
    if len(cut) > 1:
        stages = [LocalStage(stage.stage, part) for stage, part in zip(mine, built, strict=True)]
        engine.use_pipeline(partial(_pipeline, config, topology, device, stages, cut, forward))
    return engine, forward


def _pipeline(
    config: RunConfig,
    topology: Topology,
    device: torch.device,
    stages: list[LocalStage],
    cut: tuple[StageCut, ...],
    forward: Forward,
    weights_done: Callable[[nn.Module], None],
) -> Pipeline:
    training, schedule = config.training, config.parallel.pipeline_schedule
    assert training.global_batch_size is not None and schedule is not None
    rows, length = training.micro_batch_size, config.data.seq_length // topology.size("cp")
    return Pipeline(
        stages,
        [stage.rank for stage in cut],
        topology.group("pp"),
        schedule=schedule,
        micro_batches=training.global_batch_size // (rows * topology.size("dp")),
        example={"tokens": torch.empty(rows, length, dtype=torch.int64, device="meta")},
        received=partial(_stream, config, topology),
        forward=forward.through,
        weights_done=weights_done,
        device=device,
    )


def _stream(config: RunConfig, topology: Topology, inputs: Mapping[str, Tensor], stage: int) -> tuple[Tensor, ...]:
    """Like the hidden state that a stage receives."""
    rows, length = inputs["tokens"].shape
    part = length // topology.size("tp") if topology.sequence_parallel else length
    dtype = DTYPES[config.training.precision]
    return (torch.empty(rows, part, config.model.hidden_size, dtype=dtype, device="meta", requires_grad=True),)
