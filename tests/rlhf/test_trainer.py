"""The trainer in one process: what experience holds, the first step, epochs, and what is refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megazero
from megazero.base.errors import ConfigError
from megazero.rlhf import PPOConfig, PPOTrainer, RLHFEngine, advantages_and_returns, kl_rewards
from tests.rlhf.tiny import (
    EOS,
    PAD,
    PROMPTS,
    VOCAB,
    Share,
    engine,
    engines,
    language_model,
    reward_model,
    tokenizer,
    trainer,
)

START = PROMPTS.shape[1] - 1


def answers_of(experience: dict[str, Tensor], config: PPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, mask) [b, a]."""
    mask = experience["answer_mask"]
    rewards = kl_rewards(
        experience["logprobs"][:, START:],
        experience["ref_logprobs"][:, START:],
        experience["rewards"],
        mask,
        config.kl_ctl,
        config.clip_reward_value,
    )
    return *advantages_and_returns(experience["value"][:, START:], rewards, mask, config.gamma, config.lam), mask


def test_experience() -> None:
    made = trainer()
    made.train()
    found = made.generate_experience(PROMPTS)
    theirs = {"prompts", "logprobs", "ref_logprobs", "value", "rewards", "input_ids", "attention_mask"}
    assert set(found) == theirs | {"answer_mask"}
    ids, mask = found["input_ids"], found["attention_mask"]
    assert torch.equal(ids[:, :5], PROMPTS) and torch.equal(mask[:, :5], (PROMPTS != PAD).long())
    assert torch.equal(mask[:, 5:], found["answer_mask"]) and found["answer_mask"].sum(1).min() < 6
    assert all(found[name].shape == (4, ids.shape[1] - 1) for name in ("logprobs", "ref_logprobs", "value"))
    assert not any(value.requires_grad for value in found.values())
    for row in range(4):  # each alone, without padding
        text, place = ids[row : row + 1, mask[row] != 0], int(mask[row].sum()) - 1
        end = int(mask[row].nonzero()[-1])
        with torch.no_grad():
            torch.testing.assert_close(made.reward.module(text)[0], found["rewards"][row], rtol=0, atol=1e-5)
            logits = made.ref.module(text).logits.log_softmax(-1)
            torch.testing.assert_close(logits[0, place - 1, text[0, -1]], found["ref_logprobs"][row, end - 1])
            values = made.critic.module(text, return_value_only=True)
            torch.testing.assert_close(values[0, place - 1], found["value"][row, end - 1])
    assert made.actor.module.training and not made.ref.module.training
    assert made.experiences == 1 and not torch.equal(made.generate_experience(PROMPTS)["input_ids"], ids)


def test_the_first_step_has_ratio_1() -> None:
    made = trainer()
    found = made.generate_experience(PROMPTS)
    advantages, returns, mask = answers_of(found, made.config)
    actor_loss, critic_loss = made.train_rlhf(found)
    assert actor_loss.item() == pytest.approx(-float(advantages.sum() / mask.sum()), rel=1e-5)
    errors = 0.5 * (found["value"][:, START:] - returns).square() * mask
    assert critic_loss.item() == pytest.approx(float(errors.sum() / mask.sum()), rel=1e-5)
    assert not actor_loss.requires_grad and advantages.abs().max() > 0.1


def test_gradients_and_weights_are_those_of_plain_torch() -> None:
    made, plain, critic = trainer(), language_model("llama", 0), reward_model("llama", 1)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2, eps=1e-5) for each in (plain, critic)]
    found = made.generate_experience(PROMPTS)
    advantages, returns, mask = answers_of(found, made.config)
    ids, whole = found["input_ids"], found["attention_mask"]
    places = (whole.cumsum(1) - 1).clamp(min=0)
    for _ in range(2):  # the second epoch's ratio is not 1
        made.train_rlhf(found)
        logits = plain(ids, attention_mask=whole, position_ids=places).logits
        log_probs = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)[:, START:]
        ratio = (log_probs - found["logprobs"][:, START:]).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        values, old = critic(ids, whole, return_value_only=True)[:, START:-1], found["value"][:, START:]
        clipped = old + (values - old).clamp(-0.2, 0.2)
        errors = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
        for model, losses, optimizer in zip((plain, critic), (-surrogate, errors), optimizers, strict=True):
            optimizer.zero_grad()
            ((losses * mask).sum() / mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for mine, theirs in ((made.actor, plain), (made.critic, critic)):
        assert mine.global_steps == 2
        for name, wanted in theirs.state_dict().items():
            torch.testing.assert_close(mine.module.state_dict()[name], wanted, rtol=0, atol=2e-5)


def test_epochs_leave_the_experience_as_it_is() -> None:
    made = trainer()
    found = made.generate_experience(PROMPTS)
    before = {name: value.clone() for name, value in found.items()}
    losses = [made.train_rlhf(found)[1].item() for _ in range(3)]
    assert all(torch.equal(found[name], value) for name, value in before.items()) and losses[2] < losses[0]


def test_dropout_is_for_training_alone() -> None:
    made = trainer("gpt2", actor=language_model("gpt2", 0))
    for module in made.actor.module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    found = made.generate_experience(PROMPTS)
    advantages, _, mask = answers_of(found, made.config)
    assert made.actor.module.training
    made.eval()
    with torch.no_grad():
        logits = made.actor(found["input_ids"], attention_mask=found["attention_mask"]).logits
    row = found["attention_mask"][1] != 0  # without padding before it
    wanted = logits[1, :-1].log_softmax(-1).gather(1, found["input_ids"][1, 1:, None]).squeeze(1)
    torch.testing.assert_close(found["logprobs"][1][row[1:]], wanted[row[1:]])
    loss, _ = made.train_rlhf(found)
    assert made.actor.module.training and made.critic.module.training
    assert loss.item() != pytest.approx(-float(advantages.sum() / mask.sum()), rel=1e-3)


def test_answers_of_one_token_count() -> None:
    model = language_model("llama", 0)
    model.generation_config.eos_token_id = list(range(1, VOCAB))  # whatever is drawn ends the answer
    made = PPOTrainer(engines(actor=model), PPOConfig(max_answer_seq_len=6))
    found = made.generate_experience(PROMPTS)
    assert found["answer_mask"].sum(1).min() == 1 and found["input_ids"].shape[0] == 4
    before = made.actor.module.lm_head.weight.clone()
    assert all(loss.isfinite() for loss in made.train_rlhf(found))
    assert not torch.equal(made.actor.module.lm_head.weight, before)


def test_pad_may_be_the_token_that_ends() -> None:
    made = trainer()
    made.tokenizer.pad_token = "</s>"
    made = PPOTrainer(made.rlhf_engine, PPOConfig(max_answer_seq_len=6))
    prompts = PROMPTS.where(PROMPTS != PAD, EOS)
    found = made.generate_experience(prompts)
    answers, mask = found["input_ids"][:, 5:], found["answer_mask"]
    ended = mask.sum(1) < 6
    assert ended.any() and torch.equal(found["attention_mask"][:, :5], (prompts != EOS).long())
    for answer, length in zip(answers[ended], mask.sum(1)[ended].tolist(), strict=True):
        assert answer[length - 1] == EOS and (answer[: length - 1] != EOS).all()
    assert all(loss.isfinite() for loss in made.train_rlhf(found))


def test_a_given_mask_and_a_leading_token_like_padding() -> None:
    made = trainer("opt")
    prompts = torch.tensor([[0, 0, 0, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    assert made.generate_experience(prompts, mask)["attention_mask"][:, :5].tolist() == mask.tolist()
    made.critic.module.num_padding_at_beginning = 1
    assert made.generate_experience(prompts)["attention_mask"][:, :5].tolist() == [[0, 0, 1, 1, 1]]


def test_answers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(config=PPOConfig(max_answer_seq_len=6, print_answers=True, print_answers_interval=2))
    capsys.readouterr()
    for step, lines in ((2, 4), (3, 0), (None, 4), (None, 0)):
        found = made.generate_experience(PROMPTS, step=step)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines
        if lines:
            answer = made.tokenizer.decode(found["input_ids"][2, 5:], skip_special_tokens=True)
            number = made.experiences - 1 if step is None else step
            score = float(found["rewards"][2])
            assert said[2] == f"step {number} | score {score:.3f} | prompt: 9 | answer: {answer}" and answer


def test_scores_of_other_modules() -> None:
    class Headed(Share):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return types.SimpleNamespace(logits=super().forward(input_ids, attention_mask).unsqueeze(1))

    scores = [trainer(reward=reward).generate_experience(PROMPTS)["rewards"] for reward in (Share(5), Headed(5))]
    assert torch.equal(*scores) and scores[0].shape == (4,) and scores[0].max() > 0
    answered = megazero.init_inference(Share(5))
    parts = engines()
    made = PPOTrainer(RLHFEngine(parts.actor, parts.critic, parts.ref, answered, parts.tokenizer), PPOConfig(6))
    assert torch.equal(made.generate_experience(PROMPTS)["rewards"], scores[0])
    with pytest.raises(
        ConfigError, match=r"module, Values, gave shape \(4, \d+\) for 4 rows, not a score for each. Take"
    ):
        trainer(reward=Values(5)).generate_experience(PROMPTS)


class Values(Share):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.scale * input_ids


# what is refused


def test_prompts_that_are_refused() -> None:
    made = trainer()
    right = torch.tensor([[5, 6], [5, 0]])
    for mask in (None, right != 0):
        with pytest.raises(ValueError, match=r"prompt 1 ends with padding, .* on the left \(tokenizer.padding_side"):
            made.generate_experience(right, mask)
    with pytest.raises(ValueError, match="row 0 of the attention mask is 0 throughout"):
        made.generate_experience(right, torch.tensor([[0, 0], [1, 1]]))


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    made = engines()
    return {name: getattr(made, name) for name in ("actor", "critic", "ref", "reward", "tokenizer")}


def test_engines_that_are_refused(parts: dict[str, Any]) -> None:
    sharing = engine(language_model())
    sharing.module = parts["actor"].module  # initialize() of that module would end the actor's engine
    refused: list[tuple[dict[str, Any], str]] = [
        ({"actor": parts["ref"]}, "the actor is an engine without an optimizer, and it is to be trained. Make it an e"),
        ({"critic": nn.Linear(2, 2)}, "the critic is a Linear, and it is to be trained. Make"),
        ({"ref": parts["critic"]}, r"the ref is an engine with an optimizer, and it is only asked. .*init_inference"),
        ({"reward": nn.Linear(2, 2)}, "the reward is a Linear, and it is only asked. Make it"),
        ({"critic": engine(language_model(), trained=True)}, "LlamaForCausalLM, which has no value for each token. Ma"),
        ({"tokenizer": types.SimpleNamespace(pad_token_id=None)}, "has no pad token"),
        ({"ref": sharing}, "the ref is the actor: it would change with it. Load the model a sec"),
    ]
    for changed, said in refused:
        with pytest.raises(ConfigError, match=said):
            RLHFEngine(**(parts | changed))


def test_layouts_that_are_refused(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for axis in ("tp", "pp"):
        topology = types.SimpleNamespace(size=lambda name, axis=axis: 1 + (name == axis))
        with monkeypatch.context() as patch:
            patch.setattr(parts["critic"], "topology", topology)
            with pytest.raises(
                ConfigError, match=f"the critic is spread over 2 ranks along {axis}, .* with ZeRO stage 3"
            ):
                RLHFEngine(**parts)


def test_settings_that_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"PPOConfig: max_answer_seq_len 0 must be at least 1; lam 1.5 must be from 0"
    ):
        PPOConfig(max_answer_seq_len=0, lam=1.5)
    for name in ("temperature", "kl_ctl", "clip_reward_value", "cliprange", "cliprange_value", "gamma"):
        with pytest.raises(ConfigError, match=f"PPOConfig: {name} -1.0 must be "):
            PPOConfig(**{name: -1.0})
    with pytest.raises(ConfigError, match="print_answers_interval 0 must be at least 1"):
        PPOConfig(print_answers_interval=0)


def test_tokens_that_end_an_answer() -> None:
    made = engines()
    assert PPOTrainer(made).sampling.stops == (EOS,)
    assert PPOTrainer(made, PPOConfig(stop_token_ids=(9, EOS))).sampling.stops == (EOS, 9)
    assert tokenizer("</s>").pad_token_id == EOS
