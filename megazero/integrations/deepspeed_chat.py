"""`deepspeed_chat.ppo_trainer`: DeepSpeed-Chat's trainer over an object with four engines and an argparse namespace.

args.max_answer_seq_len, .temperature, .seed, .print_answers, … ─► PPOConfig;   what is unset keeps its default
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megazero.base.errors import ConfigError
from megazero.rlhf.trainer import PPOConfig, PPOTrainer, RLHFEngine

PARTS = ("actor", "critic", "ref", "reward", "tokenizer")


class DeepSpeedPPOTrainer(PPOTrainer):
    """See megazero.rlhf.PPOTrainer.

    Args:
        rlhf_engine: an RLHFEngine, or any object with actor, critic, ref, reward and tokenizer.
        args: max_answer_seq_len, and if it has them the other fields of PPOConfig (but stop_token_ids) and
            `end_of_conversation_token`, which ends an answer.

    Raises ConfigError for a missing part or argument, for align_overflow, and for an unknown token.
    """

    def __init__(self, rlhf_engine: Any, args: Any) -> None:
        missing = [name for name in PARTS if getattr(rlhf_engine, name, None) is None]
        if missing:
            raise ConfigError(
                f"rlhf_engine ({type(rlhf_engine).__name__}) has no {', '.join(missing)}. Give it {', '.join(PARTS)}, "
                "as megazero.rlhf.RLHFEngine has them."
            )
        if not isinstance(rlhf_engine, RLHFEngine):
            rlhf_engine = RLHFEngine(**{name: getattr(rlhf_engine, name) for name in PARTS})
        super().__init__(rlhf_engine, config_of(args, rlhf_engine.tokenizer))
        self.args = args


def config_of(args: Any, tokenizer: Any) -> PPOConfig:
    """The PPOConfig that a namespace of DeepSpeed-Chat's arguments means."""
    if getattr(args, "max_answer_seq_len", None) is None:
        raise ConfigError("args.max_answer_seq_len is missing: the most tokens of an answer. Set it (256, say).")
    if getattr(args, "align_overflow", False):
        raise ConfigError(
            "args.align_overflow: actor and critic each skip the steps that overflow, and lower their own loss scale. "
            "Leave it out, or train in bf16, which does not overflow."
        )
    names = [field.name for field in fields(PPOConfig) if field.name != "stop_token_ids"]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    token = getattr(args, "end_of_conversation_token", None)
    if token is not None:
        given["stop_token_ids"] = (_token(token, tokenizer),)
    return PPOConfig(**given)


def _token(text: str, tokenizer: Any) -> int:
    found = tokenizer.get_vocab().get(text)
    if found is None:
        raise ConfigError(
            f"args.end_of_conversation_token {text!r} is no token of the tokenizer. Name one that is (its own is "
            f"{tokenizer.eos_token!r}), or add it: tokenizer.add_special_tokens(…), model.resize_token_embeddings(…)."
        )
    return int(found)
