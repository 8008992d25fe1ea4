"""The blocks about RLHF: a reward model that learns preferences, then PPO with four engines."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness import Ranks
from tests.seeds import tiny
from tests.seeds.blocks import place, run
from tests.seeds.tiny import VOCAB

CONFIG = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}


def pieces() -> dict[str, Any]:
    """The names of block 11.3."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("./tiny-llama")
    tokenizer.pad_token = tokenizer.eos_token
    return {
        "torch": torch,
        "sft_model": AutoModelForCausalLM.from_pretrained("./tiny-llama"),
        "tokenizer": tokenizer,
    }


def pairs(pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected) [8, 6]: the same prompts; the better answers count up, the worse ones down."""
    starts = torch.randint(10, VOCAB - 10, (8, 1), generator=torch.Generator().manual_seed(1))
    chosen, rejected = (starts + sign * torch.tensor([0, 0, 1, 2, 3, 4]) for sign in (1, -1))
    rejected[:4, 4:] = pad  # shorter ones
    return chosen, rejected


def check_reward(folder: str) -> tuple[float, float]:
    """The share of pairs told apart, before and after."""
    from megazero.rlhf import pairwise_loss

    with place(folder):
        import deepspeed

        names = run("S2 11.3", pieces())
        loss_of = names["compute_reward_loss"]
        engine, *_ = deepspeed.initialize(model=names["reward_model"], config=CONFIG)
        chosen, rejected = pairs(names["tokenizer"].pad_token_id)
        half = slice(0, 8) if engine.world_size == 1 else slice(4 * engine.global_rank, 4 * engine.global_rank + 4)
        shares = []
        for step in range(31):
            if step % 30 == 0:
                with torch.no_grad():
                    scores = engine(chosen), engine(rejected)
                shares.append(float((scores[0] > scores[1]).float().mean()))
                torch.testing.assert_close(loss_of(engine, chosen, rejected), pairwise_loss(*scores))
            engine.backward(loss_of(engine, chosen[half], rejected[half]))
            engine.step()
    return shares[0], shares[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_reward_model_learns_preferences(world_size: int, ranks: Ranks, tmp_path: Path) -> None:
    tiny.llama(tmp_path)
    for before, after in ranks.run(check_reward, world_size, str(tmp_path)):
        assert before < 1.0 and after == 1.0


def check_ppo(folder: str, stage: int) -> None:
    with place(folder):
        import deepspeed
        from deepspeed_chat.reward_model import RewardModel

        zero = {"zero_optimization": {"stage": stage}}

        def engine(*, score: bool, trained: bool) -> Any:
            names = pieces()
            model = RewardModel(names["sft_model"], names["tokenizer"]) if score else names["sft_model"]
            config = (CONFIG if trained else {"train_micro_batch_size_per_gpu": 4}) | zero
            return deepspeed.initialize(model=model, config=config)[0]

        rlhf_engine = types.SimpleNamespace(
            actor=engine(score=False, trained=True),
            critic=engine(score=True, trained=True),
            ref=engine(score=False, trained=False),
            reward=engine(score=True, trained=False),
            tokenizer=pieces()["tokenizer"],
        )
        prompts = torch.randint(3, VOCAB, (4, 4, 5), generator=torch.Generator().manual_seed(dist.get_rank()))
        prompts[:, :2, :2] = rlhf_engine.tokenizer.pad_token_id  # shorter ones
        args = types.SimpleNamespace(num_train_epochs=2, max_answer_seq_len=8)
        before = {name: getattr(rlhf_engine, name).state_dict() for name in ("actor", "critic", "ref", "reward")}
        before = {name: {key: v.clone() for key, v in state.items()} for name, state in before.items()}
        loader = [{"input_ids": ids} for ids in prompts]
        names = run("S2 11.4", {"rlhf_engine": rlhf_engine, "args": args, "prompt_dataloader": loader})
        assert names["trainer"].experiences == 8 and rlhf_engine.actor.global_steps == 8
        assert names["out"]["input_ids"].shape[0] == 4 and names["out"]["answer_mask"].sum(1).min() >= 1
        assert names["actor_loss"].isfinite() and names["critic_loss"].isfinite()
        for name, state in before.items():
            now = getattr(rlhf_engine, name).state_dict()
            assert all(value.isfinite().all() for value in now.values())
            assert all(torch.equal(now[key], value) for key, value in state.items()) == (name in ("ref", "reward"))


@pytest.mark.parametrize("stage", [0, 3])
def test_ppo(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    tiny.llama(tmp_path)
    ranks.run(check_ppo, 2, str(tmp_path), stage)
