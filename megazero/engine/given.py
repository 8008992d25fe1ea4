"""What a script gives beside the model, made into an optimizer and a scheduler.

    optimizer     given as an object | a callable(params) | by name in the configuration | not at all: inference only
    lr_scheduler  given as an object | a callable(optimizer) | by name in the configuration | not at all
    parameters    model_parameters: parameters, (name, parameter) pairs or groups; by default all that need a gradient

What the script gives wins over the configuration, with one line said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import nn

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import Named
from megazero.engine.lr import LearningRate
from megazero.engine.optimizers.make import make_optimizer
from megazero.engine.schedulers import Course, make_scheduler

OptimizerSource = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None
Say = Callable[[str], None]


def parameters_of(
    model: nn.Module, given: Iterable[Any] | None, say: Say, gone: Set[nn.Parameter] = frozenset()
) -> list[Any]:
    """Parameters or groups for an optimizer, of what needs a gradient, each once, without those that are `gone` to
    other ranks.

    A parameter in a plain group and in one marked `moe` belongs to the latter.
    Raises ConfigError for anything else that is listed twice, and for parameters that are not the model's.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    if given is None:
        return [p for p in names if p.requires_grad]
    entries = [given] if isinstance(given, nn.Parameter) else list(given)
    if isinstance(given, dict):
        entries = [given]
    groups = [dict(entry) if isinstance(entry, dict) else {"params": [entry]} for entry in entries]
    for group in groups:
        held = group.get("params", [])
        held = [held] if isinstance(held, torch.Tensor) else list(held)
        group["params"] = [item[1] if isinstance(item, tuple) else item for item in held]
        for parameter in group["params"]:
            if not isinstance(parameter, torch.Tensor):
                raise ConfigError(
                    f"model_parameters holds a {type(parameter).__name__}. Give model.parameters(), or groups such as "
                    '{"params": [parameters], "lr": 1e-4}.'
                )
        group["params"] = [p for p in group["params"] if p not in gone]
    _without_repeats(groups, names, say)
    _check_owned(groups, names, "model_parameters")
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    if all(not isinstance(entry, dict) for entry in entries):
        return [p for group in groups for p in group["params"]]
    plain = [
        p for group, entry in zip(groups, entries, strict=True) if not isinstance(entry, dict) for p in group["params"]
    ]
    listed = [group for group, entry in zip(groups, entries, strict=True) if isinstance(entry, dict)]
    return [*([{"params": plain}] if plain else []), *listed]


def _without_repeats(groups: list[dict[str, Any]], names: dict[Any, str], say: Say) -> None:
    """Leave each parameter in one group. Raises ConfigError where it is not clear in which."""
    places: dict[Any, list[int]] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            places.setdefault(parameter, []).append(number)
    twice = {parameter: found for parameter, found in places.items() if len(found) > 1}
    experts = {p for p, found in twice.items() if any(groups[number].get("moe") for number in found)}
    unclear = [names.get(p, f"of shape {tuple(p.shape)}") for p in twice if p not in experts]
    if unclear:
        shown = ", ".join(unclear[:4]) + (f" and {len(unclear) - 4} more" if len(unclear) > 4 else "")
        raise ConfigError(
            f"model_parameters lists {len(unclear)} parameter{'s' * (len(unclear) > 1)} more than once: {shown}. List "
            "each once (model.parameters() already leaves repeats out; with groups, take from one what is in another)."
        )
    if experts:
        say(f"{len(experts)} parameters stood in a group marked moe and in another one: they are kept in the moe group")
    for number, group in enumerate(groups):
        kept: dict[Any, None] = {}
        for parameter in group["params"]:
            home = next((n for n in places[parameter] if groups[n].get("moe")), places[parameter][0])
            if home == number:
                kept[parameter] = None
        group["params"] = list(kept)


def _check_owned(groups: list[dict[str, Any]], names: dict[Any, str], what: str) -> None:
    strange = [tuple(p.shape) for group in groups for p in group["params"] if p not in names]
    if strange:
        raise ConfigError(
            f"{what} holds {len(strange)} parameters that are not the model's, the first of shape {strange[0]}. Make "
            "it from the parameters of the module that is passed as model (not of a copy, and after wrapping it)."
        )


def make_client_optimizer(
    model: nn.Module,
    given: OptimizerSource,
    parameters: Iterable[Any] | None,
    named: Named | None,
    say: Say,
    gone: Set[nn.Parameter] = frozenset(),
) -> torch.optim.Optimizer | None:
    """The optimizer over the module's parameters; None where nothing says which.

    Args:
        gone: parameters that were the module's and are other ranks' now (experts): they are taken out.

    Raises ConfigError for something that is no optimizer, has other parameters, or has none that need a gradient.
    """
    if given is not None and named is not None:
        say(f"the optimizer given to initialize() is used, not the configuration's {named.type}")
    if given is None and named is None:
        return None
    if isinstance(given, torch.optim.Optimizer):
        made = given
        for group in made.param_groups:
            group["params"] = [p for p in group["params"] if p not in gone]
        mine = {p for group in made.param_groups for p in group["params"]}
        if parameters is not None and set(_listed(parameters)) - mine - gone:
            say("model_parameters has parameters that the given optimizer has not; they are not trained")
    else:
        over = parameters_of(model, parameters, say, gone)
        if given is None and parameters is None and named is not None and named.folded == "muon":
            over = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # it asks what they are
        if not over or all(isinstance(group, dict) and not group["params"] for group in over):
            raise ConfigError(
                "there is nothing to train: no parameter needs a gradient. Call requires_grad_(True) on some, or give "
                "no optimizer, for inference."
            )
        if given is not None:
            made = given(over)
            if not isinstance(made, torch.optim.Optimizer):
                raise ConfigError(
                    f"optimizer={given!r} returned a {type(made).__name__}, not a torch.optim.Optimizer. Give an "
                    "optimizer, a function of parameters that returns one, or its name in the configuration."
                )
        else:
            assert named is not None
            made = make_optimizer(named.type, over, named.params)
    _check_owned(made.param_groups, {p: name for name, p in model.named_parameters()}, "the optimizer")
    for group in made.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return made


def _listed(parameters: Iterable[Any]) -> Iterable[Any]:
    for entry in parameters:
        yield from entry["params"] if isinstance(entry, dict) else [entry[1] if isinstance(entry, tuple) else entry]


def make_client_scheduler(optimizer: Any, given: Any, named: Named | LearningRate | None, say: Say) -> Any:
    """The scheduler of this optimizer (the one with shards in it); None where nothing says which."""
    if isinstance(named, LearningRate):
        return None if optimizer is None else Course(optimizer, named)
    if given is not None and named is not None:
        say(f"the lr_scheduler given to initialize() is used, not the configuration's {named.type}")
    if given is not None and optimizer is None:
        raise ConfigError("lr_scheduler without an optimizer: there is no learning rate to set. Give both, or neither.")
    if given is None:
        return None if named is None or optimizer is None else make_scheduler(named.type, optimizer, named.params)
    if hasattr(given, "step"):
        return given
    if callable(given):
        return given(optimizer)
    raise ConfigError(
        f"lr_scheduler={given!r} is neither a scheduler nor a function that makes one of an optimizer. Give one of "
        "these, or name it in the configuration."
    )
