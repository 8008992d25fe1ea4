"""A reward model: a language model's backbone with one number a token on top. The critic of PPO is one too.

    ids [b, s] ─ backbone ─► hidden [b, s, h] ─ v_head ─► values [b, s] ─ at each row's last token ─► scores [b]

Names in its state dict are those of DeepSpeed-Chat's RewardModel. Source: Stiennon et al. 2020, Ouyang et al. 2022.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.rlhf.padding import checked, keywords, last, real_tokens, without_adapters

SIZES = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")
"""Where configurations say how wide the last hidden states are; OPT's first one differs from its hidden_size."""


class RewardModel(nn.Module):
    """See the module.

    Args:
        base_model: a causal language model of Hugging Face's (its head is left out), its backbone alone, either with
            peft's adapters, or any module with a `config` whose first output is hidden states [b, s, h].
        tokenizer: knows the pad token.
        num_padding_at_beginning: how many tokens that look like padding each text begins with: 1 for OPT, whose texts
            begin with </s>, if that is the pad token too.

    Raises ConfigError for a tokenizer without a pad token, or an unknown width.
    """

    def __init__(self, base_model: nn.Module, tokenizer: Any, num_padding_at_beginning: int = 0) -> None:
        super().__init__()
        self.config = getattr(base_model, "config", None)
        self.num_padding_at_beginning, self.PAD_ID = num_padding_at_beginning, pad_of(tokenizer)
        self.rwtransformer: Any = _backbone(base_model)
        like = next((p for p in self.rwtransformer.parameters() if p.is_floating_point()), torch.empty(0))
        width = _width(self.config, base_model)
        self.v_head = nn.Linear(width, 1, bias=False, device=like.device, dtype=like.dtype)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_value_only: bool = False
    ) -> Tensor:
        """The score of each row [b]: the value at its last real token. With `return_value_only` all values [b, s].

        Args:
            input_ids: int64 [b, s], padded on either side.
            attention_mask: 1 for real tokens [b, s]. Without: what stands between the leading pads and the next one.

        Raises ValueError for a row without tokens.
        """
        mask = self._mask(input_ids, attention_mask)
        hidden = self.rwtransformer(input_ids, **keywords(self.rwtransformer, mask))
        values: Tensor = self.v_head(hidden if isinstance(hidden, Tensor) else hidden[0]).squeeze(-1)  # [b, s]
        return values if return_value_only else values.gather(1, last(mask).unsqueeze(1)).squeeze(1)

    def forward_value(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_value_only: bool = False,
        prompt_length: int = 0,
        **others: None,
    ) -> Tensor | dict[str, Tensor]:
        """The values [b, s], or with the score of each row: {"values": [b, s], "chosen_end_scores": [b]}.

        Args:
            prompt_length: length of the prompts' part, in which pads do not end a row; for rows without a mask.
            others: arguments that DeepSpeed-Chat's has (past_key_values, use_cache, …), without a value.

        Raises ValueError for one of `others` with a value.
        """
        given = [name for name, value in others.items() if value]
        if given:
            raise ValueError(f"forward_value() makes no use of {', '.join(given)}. Leave it out, or call the backbone.")
        mask = self._mask(input_ids, attention_mask, prompt_length)
        values: Tensor = self(input_ids, mask, return_value_only=True)  # called, so that stage 3's hooks run
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": values.gather(1, last(mask).unsqueeze(1)).squeeze(1)}

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The backbone's own."""
        self.rwtransformer.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.rwtransformer.gradient_checkpointing_disable()

    def _mask(self, ids: Tensor, mask: Tensor | None, prompt: int = 0) -> Tensor:
        if mask is not None:
            return checked(mask, ids)
        return real_tokens(ids, self.PAD_ID, self.num_padding_at_beginning, prompt)


def pad_of(tokenizer: Any) -> int:
    """The pad token's id. Raises ConfigError for a tokenizer without one."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        raise ConfigError(
            f"the tokenizer ({type(tokenizer).__name__}) has no pad token, which tells where a text ends. Give it one: "
            "tokenizer.pad_token = tokenizer.eos_token."
        )
    return int(pad)


def _backbone(model: nn.Module) -> nn.Module:
    """The part of a language model that makes hidden states."""
    model = without_adapters(model)
    inner = getattr(model, "base_model", model)
    return inner if isinstance(inner, nn.Module) else model


def _width(config: Any, model: nn.Module) -> int:
    for holder in (config, getattr(config, "text_config", None)):
        for name in SIZES:
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    raise ConfigError(
        f"RewardModel: how wide {type(model).__name__}'s hidden states are is unknown: it has no config with one of "
        f"{', '.join(SIZES)}. Give it one: model.config = types.SimpleNamespace(hidden_size=…)."
    )
