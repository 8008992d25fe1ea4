"""PPO with four engines, in the shape of DeepSpeed-Chat: answers become experience, experience trains actor and critic.

    generate_experience   prompts ─ actor ─► answers ─ actor, ref: log-probs; critic: values; reward: scores
    train_rlhf            rewards, advantages ─► policy step of the actor ─► value step of the critic

Source: Ouyang et al. 2022, Schulman et al. 2017; interface of DeepSpeedExamples' applications/DeepSpeed-Chat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megazero.base.errors import ConfigError
from megazero.engine.engine import Engine
from megazero.inference.engine import InferenceEngine
from megazero.parallel.collectives import all_reduce
from megazero.rlhf.losses import advantages_and_returns, kl_rewards, policy_loss, token_log_probs, value_loss
from megazero.rlhf.padding import checked, keywords, left_mask
from megazero.rlhf.reward import pad_of
from megazero.rlhf.rollout import Sampling, roll_out

Experience = dict[str, Tensor]


@dataclass(frozen=True)
class PPOConfig:
    """The numbers of PPO; the defaults are DeepSpeed-Chat's."""

    max_answer_seq_len: int = 256
    """Most tokens of an answer."""
    kl_ctl: float = 0.1
    """How much a token costs that the reference finds less likely than the actor does."""
    clip_reward_value: float = 5.0
    cliprange: float = 0.2
    """How far the policy may move from the one that drew the answers before the loss stops caring."""
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 1.0
    """What logits are divided by; 0 takes the likeliest token."""
    seed: int = 1234
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, beside the tokenizer's and the model's own."""
    print_answers: bool = False
    print_answers_interval: int = 1

    def __post_init__(self) -> None:
        rules = {
            "max_answer_seq_len": (self.max_answer_seq_len >= 1, "at least 1"),
            "print_answers_interval": (self.print_answers_interval >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "kl_ctl": (self.kl_ctl >= 0, "0 or more"),
            "clip_reward_value": (self.clip_reward_value > 0, "more than 0"),
            "cliprange": (self.cliprange > 0, "more than 0"),
            "cliprange_value": (self.cliprange_value > 0, "more than 0"),
            "gamma": (0 <= self.gamma <= 1, "from 0 to 1"),
            "lam": (0 <= self.lam <= 1, "from 0 to 1"),
        }
        wrong = [f"{name} {getattr(self, name)} must be {rule}" for name, (holds, rule) in rules.items() if not holds]
        if wrong:
            raise ConfigError("PPOConfig: " + "; ".join(wrong) + ".")


@dataclass(frozen=True)
class RLHFEngine:
    """The four models of PPO and their tokenizer.

    Raises ConfigError for an engine that cannot do its part.
    """

    actor: Engine
    """A causal language model with generate(), and an optimizer."""
    critic: Engine
    """A RewardModel, and an optimizer."""
    ref: Engine | InferenceEngine
    """The model that the actor started from, without an optimizer."""
    reward: Engine | InferenceEngine
    """A RewardModel, or a module that gives a score for each row, without an optimizer."""
    tokenizer: Any

    def __post_init__(self) -> None:
        for name in ("actor", "critic"):
            engine = getattr(self, name)
            if not isinstance(engine, Engine) or engine.optimizer is None:
                raise ConfigError(
                    f"the {name} is {_kind(engine)}, and it is to be trained. Make it an engine with an optimizer: "
                    'megazero.initialize(model=…, config={"optimizer": …}).'
                )
        for name in ("ref", "reward"):
            engine = getattr(self, name)
            if not isinstance(engine, Engine | InferenceEngine) or getattr(engine, "optimizer", None) is not None:
                raise ConfigError(
                    f"the {name} is {_kind(engine)}, and it is only asked. Make it an engine without an optimizer: "
                    "megazero.init_inference(model=…), or initialize() with a configuration that has none."
                )
        if self.ref is self.actor or self.ref.module is self.actor.module:
            raise ConfigError("the ref is the actor: it would change with it. Load the model a second time for it.")
        if not callable(getattr(self.critic.module, "forward_value", None)):
            raise ConfigError(
                f"the critic's module is a {type(self.critic.module).__name__}, which has no value for each token. "
                "Make it megazero.rlhf.RewardModel(base_model, tokenizer)."
            )
        pad_of(self.tokenizer)
        for name in ("actor", "critic", "ref", "reward"):
            topology = getattr(self, name).topology
            for axis in ("tp", "cp", "pp"):
                if topology.size(axis) > 1:
                    raise ConfigError(
                        f"the {name} is spread over {topology.size(axis)} ranks along {axis}, and PPO gives every rank "
                        "prompts of its own. Spread its weights with ZeRO stage 3 instead."
                    )


class PPOTrainer:
    """See the module."""

    def __init__(self, rlhf_engine: RLHFEngine, config: PPOConfig | None = None) -> None:
        self.rlhf_engine, self.config = rlhf_engine, config or PPOConfig()
        self.actor, self.critic = rlhf_engine.actor, rlhf_engine.critic
        self.ref, self.reward = rlhf_engine.ref, rlhf_engine.reward
        self.tokenizer = rlhf_engine.tokenizer
        self.sampling = Sampling(
            pad_of(self.tokenizer),
            _stops(self.tokenizer, self.actor.module, self.config.stop_token_ids),
            self.config.max_answer_seq_len,
            self.config.temperature,
            self.config.seed,
        )
        self.experiences = 0
        """How many were generated. Each draws other answers to the same prompts; set it when training goes on."""

    @torch.no_grad()
    def generate_experience(self, prompts: Tensor, mask: Tensor | None = None, step: int | None = None) -> Experience:
        """Answers to prompts, and what the four models say of them, in eval mode. Collective.

        Args:
            prompts: int64 [b, p], padded on the left.
            mask: 1 for the prompts' tokens [b, p]; without it, all but the pads that a row begins with.
            step: number of the batch, for print_answers_interval; by default of the experience.

        Returns, for answers of up to a tokens and s = p + a: prompts [b, p], input_ids and attention_mask [b, s],
        answer_mask [b, a], logprobs and ref_logprobs [b, s - 1] of each token after the first, value [b, s - 1] before
        it, and rewards [b], the scores. All numbers are fp32. Raises ValueError for prompts padded on the right.
        """
        self.eval()
        prompts = prompts.to(self.actor.device)
        mask = self._prompt_mask(prompts, mask)
        rollout = roll_out(self.actor, prompts, mask, self.sampling, self.experiences)
        ids = rollout.sequences
        attention_mask = torch.cat([mask, rollout.answer_mask], 1)
        experience = {
            "prompts": prompts,
            "input_ids": ids,
            "attention_mask": attention_mask,
            "answer_mask": rollout.answer_mask,
            "logprobs": self._log_probs(self.actor, ids, attention_mask),
            "ref_logprobs": self._log_probs(self.ref, ids, attention_mask),
            "value": self._values(ids, attention_mask)[:, :-1],
            "rewards": self._scores(ids, attention_mask),
        }
        self._print(experience, self.experiences if step is None else step)
        self.experiences += 1
        self.train()
        return experience

    def train_rlhf(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """A policy step, then a value step. Collective. The experience stays as it is, for another epoch.

        Returns (actor_loss, critic_loss): their means over the answers' tokens of all ranks.
        """
        config = self.config
        ids, attention_mask = experience["input_ids"], experience["attention_mask"]
        mask, start = experience["answer_mask"], experience["prompts"].shape[1] - 1
        old_log_probs, old_values = experience["logprobs"][:, start:], experience["value"][:, start:]
        rewards = kl_rewards(
            old_log_probs,
            experience["ref_logprobs"][:, start:],
            experience["rewards"],
            mask,
            config.kl_ctl,
            config.clip_reward_value,
        )
        advantages, returns = advantages_and_returns(old_values, rewards, mask, config.gamma, config.lam)
        self.train()
        log_probs = self._log_probs(self.actor, ids, attention_mask, start)
        actor_sum, count = policy_loss(log_probs, old_log_probs, advantages, mask, config.cliprange)
        self.actor.backward(actor_sum / count, count=count)
        self.actor.step()
        values = self._values(ids, attention_mask)[:, start:-1]
        critic_sum, _ = value_loss(values, old_values, returns, mask, config.cliprange_value)
        self.critic.backward(critic_sum / count, count=count)
        self.critic.step()
        sums = torch.stack([actor_sum.detach().double(), critic_sum.detach().double(), count.double()])
        actor_loss, critic_loss, tokens = all_reduce(sums, self.actor.topology.group("dp"))
        return (actor_loss / tokens).float(), (critic_loss / tokens).float()

    def train(self) -> None:
        """Put actor and critic in train mode."""
        self.actor.train()
        self.critic.train()

    def eval(self) -> None:
        """Put all four in eval mode."""
        for engine in (self.actor, self.critic, self.ref, self.reward):
            engine.eval()

    def _log_probs(self, engine: Any, ids: Tensor, mask: Tensor, start: int = 0) -> Tensor:
        """Of the tokens after `start`: fp32 [b, s - 1 - start]."""
        output = engine(ids, **keywords(engine.module, mask))
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            logits = logits[0]
        return token_log_probs(logits[:, start:], ids[:, start:], self.sampling.divisor)

    def _values(self, ids: Tensor, mask: Tensor) -> Tensor:
        """fp32 [b, s]."""
        values: Tensor = self.critic(ids, attention_mask=mask, return_value_only=True)
        return values.float()

    def _scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        """fp32 [b]."""
        output = self.reward(ids, **keywords(self.reward.module, mask))
        scores = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(scores, Tensor) or scores.numel() != len(ids):
            said = f"a {type(output).__name__}" if scores is None else f"shape {tuple(scores.shape)}"
            raise ConfigError(
                f"the reward's module, {type(self.reward.module).__name__}, gave {said} for {len(ids)} rows, not a "
                "score for each. Take megazero.rlhf.RewardModel, or a module whose forward gives a tensor [b]."
            )
        return scores.float().view(-1)

    def _prompt_mask(self, prompts: Tensor, mask: Tensor | None) -> Tensor:
        pad = self.sampling.pad
        if mask is None:
            kept = getattr(self.critic.module, "num_padding_at_beginning", 0)
            mask, ends = left_mask(prompts, pad, kept), prompts[:, -1] != pad
        else:
            mask = checked(mask.to(prompts.device), prompts)
            ends = mask[:, -1] != 0
        if not bool(ends.all()):
            raise ValueError(
                f"prompt {int(ends.int().argmin())} ends with padding, and its answer would come after it. Pad prompts "
                "on the left (tokenizer.padding_side = 'left')."
            )
        return mask

    def _print(self, experience: Experience, step: int) -> None:
        """Prompts and answers of rank 0, if they are to be seen."""
        if not self.config.print_answers or step % self.config.print_answers_interval:
            return
        width = experience["prompts"].shape[1]
        rows = zip(*(experience[key] for key in ("input_ids", "attention_mask", "rewards")), strict=True)
        for ids, mask, score in rows:
            said = (part[real != 0] for part, real in ((ids[:width], mask[:width]), (ids[width:], mask[width:])))
            prompt, answer = (self.tokenizer.decode(part, skip_special_tokens=True) for part in said)
            self.actor.log.main(f"step {step} | score {float(score):.3f} | prompt: {prompt} | answer: {answer}")


def _stops(tokenizer: Any, module: Any, more: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, the model's own and the caller's."""
    own = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    named = [getattr(tokenizer, "eos_token_id", None), *(own if isinstance(own, list) else [own]), *more]
    return tuple(dict.fromkeys(token for token in named if token is not None))


def _kind(engine: Any) -> str:
    if not isinstance(engine, Engine):
        return f"a {type(engine).__name__}"
    return "an engine without an optimizer" if engine.optimizer is None else "an engine with an optimizer"
