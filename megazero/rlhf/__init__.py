"""Reinforcement learning from human feedback: a reward model, answers drawn from an actor, PPO on them.

prompts ─ rollout ─► answers ─ reward, critic, reference ─► experience ─ losses ─► actor and critic step
"""

from megazero.rlhf.losses import (
    advantages_and_returns,
    kl_rewards,
    pairwise_loss,
    policy_loss,
    span_loss,
    token_log_probs,
    value_loss,
)
from megazero.rlhf.reward import RewardModel
from megazero.rlhf.rollout import Rollout, Sampling, roll_out
from megazero.rlhf.trainer import PPOConfig, PPOTrainer, RLHFEngine

__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "RLHFEngine",
    "RewardModel",
    "Rollout",
    "Sampling",
    "advantages_and_returns",
    "kl_rewards",
    "pairwise_loss",
    "policy_loss",
    "roll_out",
    "span_loss",
    "token_log_probs",
    "value_loss",
]
