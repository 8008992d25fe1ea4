"""The Python blocks that need no Hugging Face Trainer, on 1 and 2 ranks."""

from __future__ import annotations

import re
import types
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megazero.integrations import deepspeed_checkpointing
from tests.harness import Ranks
from tests.seeds.blocks import place, run, settings
from tests.seeds.tiny import WIDTH, Model, batches, examples, gpt2, loss_of, train


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def check_snippets_1_and_2(folder: str) -> None:
    with place(folder):
        names = run("S0 snippet 1", {})
        engine = names["model_engine"]
        world = dist.get_world_size() if dist.is_initialized() else 1
        assert engine.gradient_accumulation_steps() == 4 and engine.train_micro_batch_size_per_gpu() == 4 // world
        x = torch.randn(4 // world, 1024, dtype=torch.float16, device=engine.device)
        for _ in range(4):
            engine.backward(engine(x).float().square().mean())
            engine.step()
        assert engine.global_steps == 1

        run("S0 snippet 2", names)
        path, _ = names["loaded_state"]
        assert path is not None and Path("my_checkpoint/latest").exists() and engine.global_steps == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_client_optimizer_under_stage_2_and_its_checkpoint(world_size: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_snippets_1_and_2, world_size, str(tmp_path))


def test_fused_adam_beside_torchs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with place(str(tmp_path)):
        names = run("S0 snippet 3", {})
        assert "Pytorch Loss : " in capsys.readouterr().out
        step, same = names["train_step"], []
        for make in torch.optim.AdamW, names["deepspeed"].ops.adam.FusedAdam:
            torch.manual_seed(0)
            model = nn.Linear(64, 64)
            optimizer = make(model.parameters(), lr=0.001, weight_decay=0.01)
            x, y = torch.randn(8, 64), torch.randn(8, 64)
            same.append([step(model, optimizer, x, y, nn.MSELoss()) for _ in range(5)])
        assert same[0] == pytest.approx(same[1], rel=1e-6)


def check_loop(folder: str) -> None:
    with place(folder):
        model = Model()
        stream = batches(16, rank())
        names: dict[str, Any] = {
            "model": model,
            "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
            "dataloader": [next(stream) for _ in range(3)],
            "calculate_loss": loss_of,
        }
        run("S1 loop", names)
        engine = names["model_engine"]
        assert engine.global_steps == 3 and engine.get_lr() == [1e-2]  # the client's optimizer wins


def test_the_loop_of_the_masterclass(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_loop, 2, str(tmp_path))


def check_1_2(folder: str) -> None:
    with place(folder, ds_config=settings("S2 4.1")):
        args = types.SimpleNamespace(local_rank=rank())
        names = run("S2 1.2", {"torch": torch, "MyModel": Model, "args": args})
        losses = train(names["model_engine"], 2, rank())
        assert losses[-1] > 0 and names["optimizer"].param_groups[0]["eps"] == 1e-8


def test_switching_to_deepspeed(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_1_2, 2, str(tmp_path))


def check_5_1(folder: str) -> str:
    """What rank 0 prints at the end."""
    from transformers import GPT2LMHeadModel

    with place(folder, ds_config=settings("S2 4.1")), redirect_stdout(StringIO()) as printed:
        given = {"GPT2LMHeadModel": GPT2LMHeadModel, "train_dataset": examples(16), "num_epochs": 2}
        run("S2 5.1", given)["main"]()
    return printed.getvalue().splitlines()[-1]


def test_the_basic_loop(ranks: Ranks, tmp_path: Path) -> None:
    gpt2(tmp_path)
    for line in ranks.run(check_5_1, 2, str(tmp_path)):
        steps, loss = re.fullmatch(r"Step: (\d+), Loss: (\d\.\d{4})", line).groups()  # type: ignore[union-attr]
        assert int(steps) == 2 * 16 / 2 and 1 < float(loss) < 6  # "auto": a micro-batch of 1


def check_8_1(folder: str) -> None:
    config = settings("S2 8.1")
    with place(folder, ds_config=config):
        import deepspeed

        names = run("S2 8.1 code", {"nn": nn})
        layers = [names["TransformerLayer"]() for _ in range(4)]
        calls: list[int] = []
        for layer in layers:
            layer.attention, layer.norm1 = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
            layer.norm1.register_forward_hook(lambda *_: calls.append(1))
        model = Model(*layers)
        engine, *_ = deepspeed.initialize(
            model=model, config="ds_config.json", optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2)
        )
        saved = deepspeed_checkpointing.State.saved
        assert saved is not None and saved.offload and saved.slots == 4
        losses = train(engine, 3, rank())
        assert len(calls) == 3 * 4 * 2 and losses[-1] < losses[0]  # every layer ran twice


def test_activation_checkpointing(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_8_1, 2, str(tmp_path))


class Attention(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mix = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.mix(x.cumsum(-2))


class FeedForward(nn.Sequential):
    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size))


def moe_names() -> dict[str, Any]:
    return run("S2 9.1", {"nn": nn, "MultiHeadAttention": Attention, "FeedForward": FeedForward})


def check_moe(folder: str, groups: bool) -> tuple[int, int]:
    """Elements of this rank's shards in the block's moe group, and of the experts that it holds."""
    with place(folder, ds_config=settings("S2 9.2")):
        import deepspeed

        names = moe_names()
        torch.manual_seed(0)
        model = Model(names["MoETransformerBlock"](WIDTH, 4))
        parameters = model.parameters()
        if groups:
            parameters = run("S2 9.2 code", names)["create_moe_param_groups"](model)
            assert {group["name"] for group in parameters} == {"parameters", "moe_parameters"}
        config = settings("S2 9.2") | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
        engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
        losses = train(engine, 3, rank())
        assert losses[-1] < losses[0]
        held = {name.split(".")[-3] for name, _ in model.named_parameters() if "deepspeed_experts" in name}
        assert held == {str(rank())}  # one of the four
        experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
        sizes = {group.get("name"): sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
        return sizes.get("moe_parameters", 0), experts


@pytest.mark.parametrize("groups", [False, True], ids=["all parameters", "the block's groups"])
def test_mixture_of_experts(groups: bool, ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(check_moe, 4, str(tmp_path), groups)
    if groups:  # the experts' weights, which the block lists in both groups, are in its moe group alone
        assert all(shard == experts for shard, experts in results)


def stage_3(folder: str, **more: Any) -> tuple[Any, Any]:
    """An engine at stage 3 and its model."""
    import deepspeed

    torch.manual_seed(0)
    model = Model()
    config = settings("S2 2.3") | more
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0], model


def check_5_2(folder: str) -> None:
    with place(folder):
        engine, _ = stage_3(folder)
        train(engine, 2, rank())
        names = run("S2 5.2", {"model_engine": engine, "args": types.SimpleNamespace(zero_stage=3), "torch": torch})
        assert Path("checkpoints/step_2").is_dir() and isinstance(names["client_sd"], dict)
        dist.barrier()
        weights = torch.load("model_weights.pt")
        torch.manual_seed(1)
        other = Model()
        other.load_state_dict(weights)
        ids, _ = next(batches(2))
        ours, whole = engine(ids.to(engine.device)), other(ids)
        torch.testing.assert_close(ours.cpu(), whole)


def test_saving_under_stage_3(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_5_2, 2, str(tmp_path))


def check_13_1(folder: str) -> None:
    with place(folder):
        _, model = stage_3(folder)
        model.weight = model.head.weight  # as the block calls it
        expected = Model.__new__(Model)
        torch.manual_seed(0)
        expected.__init__()  # type: ignore[misc]
        names = run("S2 13.1 code", {"model": model})
        torch.testing.assert_close(names["weight_norm"].cpu(), expected.head.weight.norm())


def test_parameters_under_stage_3(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_13_1, 2, str(tmp_path))


def check_breakdowns(folder: str) -> None:
    with place(folder):
        import deepspeed

        config = run("S2 13.1", {})["ds_config"] | {"train_micro_batch_size_per_gpu": 2, "steps_per_print": 1}
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        train(engine, 3, rank())


def test_breakdowns(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_breakdowns, 2, str(tmp_path))


def check_13_2(folder: str) -> None:
    with place(folder):
        import deepspeed

        torch.manual_seed(0)
        names = run("S2 13.2", {"model": Model(), "torch": torch})
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3, **names["zero_config"]}}
        model = names["model"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        compiled = train(engine, 3, rank())
        plain, _ = stage_3(folder)
        assert compiled == pytest.approx(train(plain, 3, rank()), rel=1e-5)


def test_tuning(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(check_13_2, 2, str(tmp_path))


def test_the_layout_of_7_1() -> None:
    layout = run("S2 7.1", {})["megatron_config"]
    from megazero.config.layout import check_world_size

    sizes = {"pp": layout["pipeline_model_parallel_size"], "cp": 1, "tp": layout["tensor_model_parallel_size"]}
    check_world_size(32, **sizes, dp=layout["data_parallel_size"])
