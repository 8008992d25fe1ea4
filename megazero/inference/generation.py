"""What stands before a module's own `generate`: the limit of tokens, and what ranks that work together agree on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.engine.foreign import share_random_state
from megazero.parallel.topology import Topology

DEFAULT_NEW_TOKENS = 20  # what Hugging Face's generate() gives when nothing says how many


class Generate:
    """A module's `generate`, called through an inference engine.

    Args:
        limit: most tokens of prompt and continuation together; None: what the model takes.
        together: the ranks' forwards are collective (weights are spread over them), so that all go on until the last
            one has ended.
    """

    def __init__(
        self, module: nn.Module, topology: Topology, device: torch.device, *, limit: int | None, together: bool
    ) -> None:
        self.own = cast(Any, module).generate
        self.limit, self.together = limit, together
        if isinstance(self.own, Generate):
            self.own = self.own.own
        self.config = getattr(module, "generation_config", None)
        self.has_encoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        self.tp, self.device = topology.group("tp"), device

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own. Ranks of one tp group give the same prompt, and draw the same tokens.

        Raises ConfigError when it may become longer than the limit.
        """
        if self.limit is not None:
            self._check_length(self.limit, args, kwargs)
        share_random_state(self.tp, self.device)
        if self.together:
            kwargs.setdefault("synced_gpus", True)
        return self.own(*args, **kwargs)

    def _check_length(self, limit: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prompt = self._prompt(args, kwargs)
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.config
        new, total = (kwargs.get(key) or getattr(config, key, None) for key in ("max_new_tokens", "max_length"))
        if new is None:
            new = DEFAULT_NEW_TOKENS if total is None else max(total - prompt, 0)
        if prompt + new > limit:
            room = limit - prompt
            remedy = f"Ask for at most {room} (max_new_tokens)" if room > 0 else "Shorten the prompt"
            raise ConfigError(
                f"generate() may give {new} tokens after a prompt of {prompt}: {prompt + new} in all, and max_tokens "
                f"is {limit}. {remedy}, or raise max_tokens in init_inference()."
            )

    def _prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if self.has_encoder:
            given = kwargs.get("decoder_input_ids")
            return given.shape[1] if isinstance(given, Tensor) else 1
        found = [args[0] if args else None, *(kwargs.get(key) for key in ("inputs", "input_ids", "inputs_embeds"))]
        return next((each.shape[1] for each in found if isinstance(each, Tensor)), 1)
