"""initialize() around a PipelineModule, and with Megatron's mpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megazero.base.errors import ConfigError
from megazero.engine.mpu import topology_of
from megazero.parallel.layer_spec import LayerSpec, TiedLayerSpec
from megazero.parallel.pipeline_module import PipelineModule
from megazero.parallel.topology import Topology
from tests.engine.fronts import assert_like, batch_of, config_of, engine_of, plain, train

WIDTH, GAS = 12, 2


class Layer(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(super().forward(x))


def pipeline(stages: int) -> PipelineModule:
    layers = [LayerSpec(Layer, WIDTH, WIDTH) for _ in range(3)] + [LayerSpec(nn.Linear, WIDTH, 1)]
    return PipelineModule(
        layers,
        num_stages=stages,
        loss_fn=lambda out, target: F.mse_loss(out.squeeze(-1).float(), target),
        seed_layers=True,
    )


class Data(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        x, target = batch_of(index // 16)
        return x[index % 16], target[index % 16]


def run_pipeline(stages: int, stage: int, precision: str, steps: int = 4) -> tuple[list[float], Any, Any]:
    fp16 = {"enabled": precision == "fp16", "auto_cast": True, "initial_scale_power": 4}
    config = config_of(stage, precision, gas=GAS, clip=0.5) | {"fp16": fp16}
    config["train_micro_batch_size_per_gpu"] = 16 // GAS // (Topology.build(pp=stages).dp)
    engine = engine_of(pipeline(stages), config, training_data=Data())
    losses = [engine.train_batch().item() for _ in range(steps)]
    assert engine.global_steps == steps and engine.micro_steps == steps * GAS
    state = engine.consolidated_state_dict(fp32=True)
    return losses, state, engine.eval_batch().item()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pipelines_equal_one_process(ranks: Any, stage: int) -> None:
    (losses, state, evaluated), *_ = ranks.run(run_pipeline, 1, 1, 1, "fp32")
    for size, stages in [(2, 2), (4, 2)]:
        results = ranks.run(run_pipeline, size, stages, stage, "fp32")
        for found, _, other in results:
            assert found == pytest.approx(losses, rel=1e-5) and other == pytest.approx(evaluated, rel=1e-5)
        assert results[0][1].keys() == state.keys()
        for name, weight in results[0][1].items():
            torch.testing.assert_close(weight, state[name], rtol=0, atol=2e-5)


def test_options_of_the_configuration() -> None:
    config = config_of(gas=GAS, pipeline={"activation_checkpoint_interval": 2, "seed_layers": True})
    engine = engine_of(pipeline(1), config)
    loss = engine.train_batch(iter([(torch.ones(8, WIDTH), torch.ones(8))] * GAS))
    plain_engine = engine_of(pipeline(1), config_of(gas=GAS))
    assert torch.equal(loss, plain_engine.train_batch(iter([(torch.ones(8, WIDTH), torch.ones(8))] * GAS)))
    assert [stage.module.interval for stage in engine.module._stages] == [2]


def tied_layers() -> list[Any]:
    tied = [TiedLayerSpec("mix", Layer, WIDTH, WIDTH), TiedLayerSpec("mix", Layer, WIDTH, WIDTH)]
    return [tied[0], LayerSpec(Layer, WIDTH, WIDTH), tied[1], LayerSpec(nn.Linear, WIDTH, 1)]


def check_seed_layers(stages: int) -> None:
    """What the configuration asks for is what the constructor does, also for weights that stages share."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    config = config_of(pipeline={"seed_layers": True})
    asked = PipelineModule(tied_layers(), stages, loss_fn=F.mse_loss, seed_layers=True, base_seed=5)
    later = PipelineModule(tied_layers(), stages, loss_fn=F.mse_loss, base_seed=5).to(torch.float64)
    held = dict(later.named_parameters())
    assert not any(torch.equal(held[name].float(), weight) for name, weight in asked.named_parameters())
    engine_of(later, config)
    for name, weight in asked.named_parameters():
        assert held[name] is dict(later.named_parameters())[name]
        assert torch.equal(held[name].float(), weight)


def test_layers_are_seeded_by_the_configuration(ranks: Any) -> None:
    check_seed_layers(1)
    ranks.run(check_seed_layers, 2, 2)


def check_changed_values() -> bool:
    """Values that one rank has loaded stay, on all ranks."""
    later = PipelineModule(tied_layers(), dist.get_world_size(), loss_fn=F.mse_loss)
    if dist.get_rank() == 1:
        later.layers["3"].bias.data.fill_(7.0)
    before = {name: weight.clone() for name, weight in later.named_parameters()}
    engine_of(later, config_of(pipeline={"seed_layers": True}))
    return all(torch.equal(weight, before[name]) for name, weight in later.named_parameters())


def test_layers_whose_values_were_changed_are_not_seeded(ranks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks.run(check_changed_values, 2) == [True, True]
    capsys.readouterr()
    late = PipelineModule([LayerSpec(nn.Linear, WIDTH, 1)], num_stages=1, loss_fn=F.mse_loss)
    late.layers["0"].weight.data.zero_()
    engine_of(late, config_of(pipeline={"seed_layers": True}))
    assert capsys.readouterr().out.count("pipeline.seed_layers comes too late") == 1
    assert not late.layers["0"].weight.any()


def test_pipeline_in_fp16(ranks: Any) -> None:
    (losses, *_), *_ = ranks.run(run_pipeline, 1, 1, 1, "fp32")
    (found, *_), *_ = ranks.run(run_pipeline, 2, 2, 1, "fp16")
    assert found == pytest.approx(losses, rel=2e-2)


def check_refusals() -> None:
    engine = engine_of(pipeline(2), config_of(gas=GAS))
    for call in (lambda: engine(torch.ones(1)), lambda: engine.backward(torch.ones(())), engine.step):
        with pytest.raises(ConfigError, match=r"with a pipeline of several stages: use engine\.train_batch\(\)"):
            call()
    with pytest.raises(ConfigError, match=r"micro-batch is \(inputs, labels\), not a list of 3"):
        engine.train_batch(iter([[torch.ones(8, WIDTH)] * 3] * GAS))
    with pytest.raises(ConfigError, match=r"micro-batch is \(inputs, labels\), not a dict"):
        engine.train_batch(iter([{"x": torch.ones(8, WIDTH)}] * GAS))
    cast = engine_of(pipeline(2), config_of(gas=GAS, torch_autocast={"enabled": True, "dtype": "bfloat16"}))
    with pytest.raises(ConfigError, match=r"autocast with a pipeline of several stages"):
        cast.train_batch(iter([(torch.ones(8, WIDTH), torch.ones(8))] * GAS))


def test_what_pipelines_refuse(ranks: Any) -> None:
    ranks.run(check_refusals, 2)


# mpu


class Mpu:
    """The groups of one rank, as Megatron's mpu gives them."""

    def __init__(self, model: Any, data: Any) -> None:
        self.get_model_parallel_group, self.get_data_parallel_group = lambda: model, lambda: data


def make_mpu(tp: int) -> Mpu:
    """tp over neighbours, data parallel over the rest. Every rank makes every group, in one order."""
    size, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for kind in (
        [list(range(start, start + tp)) for start in range(0, size, tp)],
        [list(range(first, size, tp)) for first in range(tp)],
    ):
        handles = {tuple(ranks): dist.new_group(ranks) for ranks in kind}
        found.append(next(handle for ranks, handle in handles.items() if rank in ranks))
    return Mpu(*found)


def check_mpu() -> None:
    """Two ranks hold the same data, and the two pairs of them share the batch."""
    mpu = make_mpu(2)
    topology = topology_of(mpu)
    assert (topology.size("dp"), topology.size("tp"), topology.size("pp"), topology.size("zero")) == (2, 2, 1, 2)
    for stage in (1, 3):
        engine = engine_of(config=config_of(stage, clip=0.3), mpu=mpu)
        assert engine.dp_world_size == 2 and engine.train_micro_batch_size_per_gpu() == 8
        train(engine, 3)
        assert_like(engine, plain(3, clip=0.3)[0])
    swapped = Mpu(mpu.get_data_parallel_group(), mpu.get_model_parallel_group())
    if dist.get_rank() in (1, 2):
        with pytest.raises(ConfigError, match=r"ranks count tensor first, then data, then pipeline"):
            topology_of(swapped)
    with pytest.raises(ConfigError, match=r"has no get_data_parallel_group\(\)"):
        topology_of(object())


def test_mpu(ranks: Any) -> None:
    ranks.run(check_mpu, 4)


class Column(nn.Module):
    """Half of the rows of a matrix on each of two ranks, and a bias that both hold."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        whole = torch.arange(8.0).view(4, 2)
        self.weight = nn.Parameter(whole.chunk(2)[rank].clone())
        self.weight.tensor_model_parallel, self.weight.partition_dim = True, 0  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.ones(2))

    def forward(self) -> torch.Tensor:
        return self.weight.square().sum() / 2 + self.bias.sum()


def check_split() -> None:
    rank = dist.get_rank()
    engine = engine_of(Column(rank), config_of() | {"train_batch_size": 1}, mpu=make_mpu(2))
    engine.backward(engine())
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx((sum(n * n for n in range(8)) + 2) ** 0.5, rel=1e-6)
    state = engine.consolidated_state_dict()
    assert rank == 1 or (state["weight"].shape == (4, 2) and state["weight"][3, 1] == pytest.approx(6.99, abs=0.01))


def test_parameters_that_an_mpus_layers_split(ranks: Any) -> None:
    ranks.run(check_split, 2)


def test_mpu_of_one_process() -> None:
    assert topology_of(object()).world_size == 1
