"""It learns; and it runs in 16 bits, and with adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megazero.rlhf import PPOConfig, PPOTrainer, RLHFEngine
from tests.rlhf.tiny import PAD, PROMPTS, Share, engine, language_model, reward_model, tokenizer, trainer

WANTED = 13


class ShareOfAnswers(Share):
    """The share among the last eight ids."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids[:, -8:], attention_mask[:, -8:]) * 4.0


def learner(sign: float = 1.0) -> PPOTrainer:
    reward = ShareOfAnswers(WANTED)
    torch.nn.init.constant_(reward.scale, sign)
    model = language_model("llama", 0)
    model.generation_config.eos_token_id = None  # answers of equal length
    words = tokenizer()
    words.eos_token = None
    clip = {"gradient_clipping": 1.0}
    return PPOTrainer(
        RLHFEngine(
            actor=engine(model, trained=True, **clip),
            critic=engine(reward_model("llama", 1), trained=True, **clip),
            ref=engine(language_model("llama", 0)),
            reward=engine(reward),
            tokenizer=words,
        ),
        PPOConfig(max_answer_seq_len=8, kl_ctl=0.02),
    )


def curve(made: PPOTrainer, steps: int) -> list[float]:
    """The mean share of the wanted token among the answers, step by step."""
    prompts, means = PROMPTS.repeat(4, 1), []
    for _ in range(steps):
        found = made.generate_experience(prompts)
        means.append(float((found["input_ids"][:, 5:] == WANTED).double().mean()))
        for _ in range(2):
            made.train_rlhf(found)
    return means


def test_it_learns() -> None:
    means = curve(learner(), 30)
    first, last = sum(means[:5]) / 5, sum(means[-5:]) / 5
    assert first < 0.15 and last > 0.6, means


def test_it_learns_the_opposite() -> None:
    means = curve(learner(-1.0), 12)
    assert sum(means[:3]) > 0 and sum(means[-3:]) < 0.5 * sum(means[:3]), means


def check_16_bits(name: str, stage: int) -> None:
    section: dict[str, Any] = {"enabled": True} | ({"initial_scale_power": 8} if name == "fp16" else {})
    made = trainer("gpt2", stage=stage, **{name: section})
    rank, ranks = made.actor.topology.rank, made.actor.topology.world_size
    before = {key: value.clone() for key, value in made.actor.state_dict().items()}
    for _ in range(2):
        found = made.generate_experience(PROMPTS.chunk(ranks)[rank])
        assert all(found[key].dtype == torch.float32 for key in ("logprobs", "ref_logprobs", "value", "rewards"))
        for _ in range(2):
            assert all(loss.isfinite() for loss in made.train_rlhf(found))
    after = made.actor.state_dict()
    assert made.actor.global_steps == 4 and made.actor.skipped_steps == made.critic.skipped_steps == 0
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    half = torch.bfloat16 if name == "bf16" else torch.float16
    assert all(value.dtype == half for value in after.values() if value.is_floating_point())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_16_bits(name: str, ranks: Any) -> None:
    for stage in (2, 3):
        ranks.run(check_16_bits, 2, name, stage)


def check_adapters(stage: int) -> None:
    peft = pytest.importorskip("peft")
    base = language_model("llama", 0)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = trainer(actor=peft.get_peft_model(base, settings), stage=stage)
    for _ in range(2):
        found = made.generate_experience(PROMPTS)
        assert all(loss.isfinite() for loss in made.train_rlhf(found))
    moved = 0
    for name, value in made.actor.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in frozen:
            assert torch.equal(value, frozen[plain]), name
        elif "lora_B" in name:
            moved += int(value.abs().sum() > 0)
    assert moved == 2 * 2
    assert made.sampling.pad == PAD


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_an_actor_of_adapters(world: int, stage: int, ranks: Any) -> None:
    ranks.run(check_adapters, world, stage)
