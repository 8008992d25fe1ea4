"""How a batch goes into any module, and the loss that comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from megazero.base.errors import ConfigError


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors there, in tuples, lists and mappings of any depth."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(to_device(value, device) for value in batch)
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def call(module: Any, batch: Any) -> Any:
    """The module on a batch: a mapping goes in as keywords, a tuple or list as arguments, anything else as the one."""
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, list | tuple):
        return module(*batch)
    return module(batch)


def loss_in(output: Any, module: nn.Module) -> Tensor:
    """The loss of a module's output: itself, its `.loss`, its "loss", or its first element.

    Raises ConfigError when there is no scalar tensor in these places.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(getattr(output, "loss", None), Tensor):
        found = output.loss
    elif isinstance(output, list | tuple) and output:
        found = output[0]
    if isinstance(found, Tensor) and found.numel() == 1:
        return found.reshape(())
    said = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
    raise ConfigError(
        f"train_batch() and eval_batch() need a loss, and {type(module).__name__} returned {said}. Let its forward "
        'return a scalar loss, (loss, …), an object with .loss or a mapping with "loss" (Hugging Face models do when '
        "the batch has labels); or call engine(…), engine.backward(loss) and engine.step() yourself."
    )


def named_micro_batch(batch: Any, *, labelled: bool) -> tuple[Any, Any]:
    """The (inputs, labels) of a PipelineModule's micro-batch, each a tensor or a tuple of tensors.

    Args:
        labelled: there is a loss_fn, which takes the labels. Else they may be None.

    Raises ConfigError for anything else.
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        of = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
        raise ConfigError(
            f"a PipelineModule's micro-batch is (inputs, labels), not a {type(batch).__name__}{of}. Give a collate_fn "
            "that returns both, or engine.set_batch_fn(…) a function that makes both of a batch."
        )
    inputs, labels = batch
    for kind, value in (("inputs", inputs), ("labels", labels)):
        if kind == "labels" and value is None and not labelled:
            continue
        for part in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(part, Tensor):
                raise ConfigError(
                    f"the {kind} of a PipelineModule's micro-batch are tensors, not a {type(part).__name__}: every "
                    "stage has to know their shapes. Give a collate_fn that returns (inputs, labels), each a tensor or "
                    "a tuple of tensors."
                )
    return inputs, labels


def refuse_unlike(micro_batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises ConfigError when the micro-batches of one step through a pipeline differ in shape."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in batch.items()} for batch in micro_batches]
    for index, other in enumerate(shapes):
        if other != shapes[0]:
            raise ConfigError(
                f"train_batch(): micro-batch 0 has shapes {shapes[0]}, micro-batch {index} of the same step {other}: a "
                "pipeline takes equal ones in a step (other steps may have others). Pad them, with drop_last=True for "
                "the loader's last one."
            )
