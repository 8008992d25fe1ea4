"""Where `train_batch` takes its micro-batches from: an iterator given with the call, or one that stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from megazero.base.errors import ConfigError
from megazero.engine.batches import to_device
from megazero.engine.loader import RepeatingLoader


class Feed:
    """An engine's source of batches. `loader` is what initialize() made of training_data, if anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loader: Any = None
        self.iterator: Iterator[Any] | None = None
        self.batch_fn: Callable[[Any], Any] | None = None
        """Makes of each batch what the module takes."""

    def set_loader(self, loader: Iterable[Any]) -> None:
        """Go round and round this one from now on."""
        self.loader, self.iterator = loader, None

    def take(self, given: Iterable[Any] | None, what: str, wanted: int) -> list[Any]:
        """The next micro-batches, on the device, for the method `what`.

        Raises ConfigError when there is no source, when it is no iterator, or when it ends too early.
        """
        if given is None and self.iterator is None:
            if self.loader is None:
                raise ConfigError(
                    f"{what}() has no data. Give initialize() training_data=…, or {what}() an iterator, or call "
                    "engine.set_dataloader(…) or engine.set_dataiterator(…)."
                )
            self.iterator = RepeatingLoader(self.loader)
        source = self.iterator if given is None else given
        if not isinstance(source, Iterator):
            raise ConfigError(
                f"{what}() got a {type(source).__name__}, from which every call would take the same first batches. "
                "Give iter(…) of it, made once, or engine.set_dataloader(…)."
            )
        batches = [batch for _, batch in zip(range(wanted), source, strict=False)]
        if len(batches) < wanted:
            raise ConfigError(
                f"{what}() takes {wanted} micro-batches, and the iterator had {len(batches)} left. Make a new one for "
                "each epoch, or give the loader to engine.set_dataloader(…), which goes round."
            )
        made = batches if self.batch_fn is None else [self.batch_fn(batch) for batch in batches]
        return [to_device(batch, self.device) for batch in made]
