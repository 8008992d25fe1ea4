"""Hugging Face models split over tp by their own plans, against one process: losses, gradients, weights, states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megazero
from megazero.engine.engine import Engine
from megazero.parallel.collectives import gather_objects
from megazero.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megazero.zero import safe_get_full_grad
from tests.parallel.foreign_models import LR, ids_of, make, plain

STEPS = 3


def config_of(stage: int, tp: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01}},
        "tensor_parallel": {"tp_size": tp},
    } | more


def engine_of(family: str, stage: int, tp: int = 2, **arguments: Any) -> Engine:
    model = make(family, seed=3 + (dist.get_rank() if dist.is_initialized() else 0))  # rank 0's values are everyone's
    return megazero.initialize(model=model, config=config_of(stage, tp), **arguments)[0]


def loss_at(engine: Engine, step: int) -> torch.Tensor:
    group = engine.topology.group("dp")
    ids = ids_of(step).chunk(group.size)[group.rank]
    return engine(input_ids=ids, labels=ids).loss


def mean_over_replicas(engine: Engine, loss: torch.Tensor) -> float:
    return sum(gather_objects(loss.item(), engine.topology.group("dp"))) / engine.topology.size("dp")


def whole_of(engine: Engine, parameter: torch.nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    """A logical tensor of what each tp rank has of it."""
    spec = parameter.shard_spec
    found = torch.full(spec.shape, torch.nan)
    for boxes, part in gather_objects((spec.boxes, local), engine.topology.group("tp")):
        for box, values in zip(boxes, part.chunk(len(boxes)), strict=True):
            box.of(found).copy_(values)
    return found


def train(engine: Engine, first: int = 0, steps: int = STEPS) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = loss_at(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(mean_over_replicas(engine, loss.detach()))
    return losses


def assert_gradients(engine: Engine, wanted: dict[str, torch.Tensor]) -> None:
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, parameter in engine.module.named_parameters():
        found = whole_of(engine, parameter, safe_get_full_grad(parameter))
        scale = max(float(wanted[name].norm()), 1e-6 * float(whole))
        assert float((found - wanted[name]).norm()) <= 1e-4 * scale, name


def assert_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=2e-5, msg=name)


def check_training(family: str, stage: int) -> float:
    model, losses, gradients = plain(family, STEPS)
    engine = engine_of(family, stage)
    loss = loss_at(engine, 0)
    engine.backward(loss)
    assert_gradients(engine, gradients)
    engine.step()
    found = [mean_over_replicas(engine, loss.detach()), *train(engine, 1, STEPS - 1)]
    assert found == pytest.approx(losses, rel=1e-5)
    state = engine.consolidated_state_dict(fp32=True)
    assert_weights(gather_objects(state, engine.topology.group("world"))[0], model.state_dict())
    assert_weights(engine.state_dict(), model.state_dict())
    return max(abs(a - b) / b for a, b in zip(found, losses, strict=True))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi3", "GPT2"])
def test_two_tensor_parallel_ranks(family: str, ranks: Any) -> None:
    assert max(ranks.run(check_training, 2, family, 1)) < 1e-5


@pytest.mark.parametrize(("family", "stage"), [("Llama", 1), ("Llama", 3), ("Qwen2", 3), ("Qwen3", 2), ("GPT2", 3)])
def test_tensor_and_data_parallel(family: str, stage: int, ranks: Any) -> None:
    assert max(ranks.run(check_training, 4, family, stage)) < 1e-5


def check_fault(fault: str) -> bool:
    """Whether the comparison sees a layer that does not communicate."""
    from megazero.parallel import tensor

    saved = getattr(tensor, fault)
    setattr(tensor, fault, lambda x, topology: x)
    try:
        check_training("Llama", 1)
    except AssertionError:
        return True
    finally:
        setattr(tensor, fault, saved)
    return False


@pytest.mark.parametrize("fault", ["enter_tensor_parallel", "leave_tensor_parallel"])
def test_faults_are_seen(fault: str, ranks: Any) -> None:
    assert all(ranks.run(check_fault, 2, fault))


def check_layers() -> None:
    engine = engine_of("Llama", 0)
    layer = engine.module.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, ColumnParallelLinear) and isinstance(
        layer.mlp.down_proj, RowParallelLinear
    )
    assert not isinstance(layer.self_attn.q_proj, torch.nn.Linear)
    assert (layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features) == (16, 12)
    assert tuple(layer.mlp.up_proj.weight.shape) == (12, 16) and tuple(layer.mlp.down_proj.weight.shape) == (16, 12)
    assert tuple(engine.module.lm_head.weight.shape) == (18, 16)
    assert [name for name, _ in engine.module.named_parameters()] == [n for n, _ in make("Llama").named_parameters()]
    tied = engine_of("Qwen2", 1).module
    assert isinstance(tied.lm_head, torch.nn.Linear) and tied.lm_head.weight is tied.model.embed_tokens.weight


def test_what_a_split_model_consists_of(ranks: Any) -> None:
    ranks.run(check_layers, 2)


def check_client_optimizer() -> None:
    """One that was made over the whole parameters, in two groups."""
    model, losses, _ = plain("Llama", STEPS)
    ours = make("Llama")
    vectors = [p for p in ours.parameters() if p.dim() == 1]
    matrices = [p for p in ours.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], lr=LR, weight_decay=0.01)
    settings = config_of(2, 2)
    del settings["optimizer"]
    engine = megazero.initialize(model=ours, optimizer=optimizer, config=settings)[0]
    assert train(engine) == pytest.approx(losses, rel=1e-5)
    assert_weights(engine.state_dict(), model.state_dict())


def test_an_optimizer_made_before_the_split(ranks: Any) -> None:
    ranks.run(check_client_optimizer, 2)


def save(folder: str, stage: int, tp: int) -> None:
    engine = engine_of("Llama", stage, tp)
    train(engine, 0, 2)
    engine.save_checkpoint(folder)


def resume(folder: str, stage: int, tp: int) -> list[float]:
    engine = engine_of("Llama", stage, tp)
    engine.load_checkpoint(folder)
    return train(engine, 2, 1)


@pytest.mark.parametrize(("before", "after"), [((1, 1, 1), (2, 3, 2)), ((4, 3, 2), (2, 1, 1))])
def test_a_checkpoint_moves_between_layouts(
    before: tuple[int, int, int], after: tuple[int, int, int], ranks: Any, tmp_path: Path
) -> None:
    """(ranks, stage, tp) -> (ranks, stage, tp)."""
    ranks.run(save, before[0], str(tmp_path), *before[1:])
    found = ranks.run(resume, after[0], str(tmp_path), *after[1:])[0]
    assert found == pytest.approx(plain("Llama", STEPS)[1][2:], rel=1e-5)


def check_load_state_dict(stage: int) -> None:
    engine, other = engine_of("GPT2", stage), make("GPT2", seed=77)
    engine.load_state_dict(other.state_dict())
    ids = ids_of(9)
    torch.testing.assert_close(engine(input_ids=ids).logits, other(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert_weights(engine.state_dict(), other.state_dict())


@pytest.mark.parametrize("stage", [0, 3])
def test_whole_tensors_are_loaded(stage: int, ranks: Any) -> None:
    ranks.run(check_load_state_dict, 4, stage)


def check_dropout() -> list[float]:
    """Ranks of one tp group drop the same elements, whatever their seeds were."""
    torch.manual_seed(100 + dist.get_rank())
    model = make("GPT2", resid_pdrop=0.2, embd_pdrop=0.2)
    torch.manual_seed(100 + dist.get_rank())
    engine = megazero.initialize(model=model.train(), config=config_of(1, 2))[0]
    losses = [loss_at(engine, step).item() for step in range(2)]
    engine.module.eval()
    return [*losses, loss_at(engine, 0).item()]


def test_dropout_is_the_same_on_a_group(ranks: Any) -> None:
    first, second = ranks.run(check_dropout, 2)
    assert first == second and abs(first[0] - first[2]) > 1e-3


def check_init(stage: int) -> None:
    """A model built under zero.Init is split from its slices."""
    model, losses, _ = plain("Llama", STEPS)
    with megazero.zero.Init():
        ours = make("Llama")
    engine = megazero.initialize(model=ours, config=config_of(stage, 2))[0]
    assert train(engine) == pytest.approx(losses, rel=1e-5)
    assert_weights(engine.state_dict(), model.state_dict())


def test_a_model_that_was_built_sharded(ranks: Any) -> None:
    ranks.run(check_init, 4, 3)


def check_loader() -> list[int]:
    """The first micro-batch that this rank takes from a dataset, and a step of it."""
    samples = [{"input_ids": row, "labels": row} for row in ids_of(5, rows=8)]
    engine, _, loader, _ = megazero.initialize(
        model=make("Llama"), config=config_of(2, 2), training_data=samples, model_parameters=None
    )
    first = next(iter(loader))["input_ids"]
    assert torch.isfinite(engine.train_batch())
    return [engine.topology.coord["dp"], *first.flatten().tolist()]


def test_ranks_of_one_tp_group_see_the_same_batch(ranks: Any) -> None:
    first, second, third, fourth = ranks.run(check_loader, 4)
    assert first == second and third == fourth and first[1:] != third[1:]
