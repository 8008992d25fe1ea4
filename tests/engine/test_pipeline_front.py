"""A PipelineModule under initialize(): train_batch and eval_batch on two stages do what one process does, whatever the
shapes and the number of micro-batches; batches that cannot travel are refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megazero
from megazero import LayerSpec, PipelineModule, TiedLayerSpec
from megazero.base.errors import ConfigError

VOCABULARY, WIDTH, STEPS = 12, 8, 4


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.norm(x)))


def logits(layer: nn.Embedding, x: Tensor) -> Tensor:
    return x @ layer.weight.t()


def mean_loss(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


def engine_of(stages: int, micro_batches: int, stage: int = 1, **settings: Any) -> Any:
    layers = [
        TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH),
        *[LayerSpec(Residual) for _ in range(3)],
        TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH, forward_fn=logits),
    ]
    settings = {"loss_fn": mean_loss, "seed_layers": True} | settings
    module = PipelineModule(layers, num_stages=stages, **settings)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return megazero.initialize(model=module, config=config)[0]


def text(step: int, index: int, length: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + index)
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def train(stages: int, micro_batches: int, lengths: list[int], stage: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of training and evaluation, and norms; whole weights, on the first rank."""
    engine, found = engine_of(stages, micro_batches, stage), []
    for step in range(STEPS):
        length = lengths[step % len(lengths)]
        batches = [text(step, index, length) for index in range(micro_batches)]
        found += [float(engine.train_batch(iter(batches))), engine.get_global_grad_norm()]
        found.append(float(engine.eval_batch(iter([text(50, 0, length + 1, 3)]), num_micro_batches=1)))
    return found, engine.consolidated_state_dict()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("micro_batches", "lengths"), [(4, [5]), (4, [5, 7, 3]), (1, [5]), (1, [4, 6])], ids=lambda value: str(value)
)
def test_equals_one_process(ranks: Any, micro_batches: int, lengths: list[int], stage: int) -> None:
    wanted, weights = ranks.run(train, 1, 1, micro_batches, lengths)[0]
    for rank, (found, others) in enumerate(ranks.run(train, 2, 2, micro_batches, lengths, stage)):
        assert found == pytest.approx(wanted, rel=1e-4), rank
        if rank == 0:
            assert others.keys() == weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-5, msg=name)


def refused(batches: list[Any]) -> list[str]:
    """What train_batch and eval_batch say; the engine works afterwards."""
    engine, said = engine_of(2, 2), []
    for method in (engine.train_batch, engine.eval_batch):
        with pytest.raises(ConfigError) as error:
            method(iter(batches))
        said.append(str(error.value))
    assert float(engine.train_batch(iter([text(0, 0, 4), text(0, 1, 4)]))) > 0
    return said


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            ({"ids": text(0, 0, 4)[0]}, text(0, 0, 4)[1]),
            "the inputs of a PipelineModule's micro-batch are tensors, not a",
        ),
        ((text(0, 0, 4)[0], None), "the labels of a PipelineModule's micro-batch are tensors, not a NoneType"),
        (
            (text(0, 0, 4)[0], (text(0, 0, 4)[1], 3)),
            "the labels of a PipelineModule's micro-batch are tensors, not a int",
        ),
    ],
    ids=["a dict", "no labels", "a number"],
)
def test_what_cannot_travel(ranks: Any, batch: Any, message: str) -> None:
    for said in ranks.run(refused, 2, [batch, batch]):
        assert all(message in line and "collate_fn" in line for line in said)


def of_mappings() -> tuple[list[float], list[float]]:
    """Losses of training and evaluation on pairs, and on mappings of which a function makes pairs."""
    pairs, found = [text(0, index, 5) for index in range(2)], []
    for mapped in (False, True):
        engine, batches = engine_of(2, 2), pairs
        if mapped:
            with pytest.raises(ConfigError, match="set_batch_fn"):
                engine.train_batch(iter([{"ids": pairs[0][0]}] * 2))
            engine.set_batch_fn(lambda batch: (batch["ids"], batch["labels"]))
            batches = [{"ids": ids, "labels": labels} for ids, labels in pairs]
        found.append([float(method(iter(batches))) for method in (engine.train_batch, engine.eval_batch)])
    return found[0], found[1]


def test_a_function_of_each_batch(ranks: Any) -> None:
    for wanted, found in ranks.run(of_mappings, 2):
        assert found == wanted


def unequal() -> str:
    engine = engine_of(2, 2)
    with pytest.raises(ConfigError) as error:
        engine.train_batch(iter([text(0, 0, 4), text(0, 1, 4, rows=1)]))
    return str(error.value)


def test_unequal_shapes_in_a_step(ranks: Any) -> None:
    first, second = ranks.run(unequal, 2)
    assert first == second and "micro-batch 1 of the same step {'input0': (1, 4), 'label0': (1, 4)}" in first


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY))

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(output + self.bias, labels)


def train_loss_module(stages: int, folder: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and norms; the weights that a fresh engine loads from its checkpoint."""
    engine, found = engine_of(stages, 4, loss_fn=Weighted()), []
    for step in range(STEPS):
        found.append(float(engine.train_batch(iter([text(step, index, 5) for index in range(4)]))))
        found.append(engine.get_global_grad_norm())
    engine.save_checkpoint(folder)
    fresh = engine_of(stages, 4, loss_fn=Weighted())
    fresh.load_checkpoint(folder)
    return found, fresh.consolidated_state_dict()


def test_a_loss_with_parameters_is_trained_and_saved(ranks: Any, tmp_path: Path) -> None:
    wanted, weights = ranks.run(train_loss_module, 1, 1, str(tmp_path / "one"))[0]
    answers = ranks.run(train_loss_module, 2, 2, str(tmp_path / "two"))
    assert not torch.equal(weights["loss_fn.bias"], Weighted().bias)
    for found, _ in answers:
        assert found == pytest.approx(wanted, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(answers[0][1][name], weight, rtol=1e-3, atol=1e-5, msg=name)
