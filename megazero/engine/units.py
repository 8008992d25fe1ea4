"""What stage 3 gathers as one: the units of a module that knows nothing of megazero.

    embed ─┊─ block 0 ─┊─ block 1 ─┊─ … ─┊─ norm ─┊─ head        ┊ = unit boundaries; a block goes as a whole

Blocks are what Hugging Face's `_no_split_modules` names, else the repeated members of module lists. What holds
parameters outside the blocks (embeddings, final norm, head) is a unit of its own, module by module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def units_of(model: nn.Module) -> list[str]:
    """Names of the modules that are gathered, and reduced, as one: disjoint, in registration order.

    A parameter that stands directly in a module with units inside it (a gate beside a list of blocks) belongs to none.
    """
    own = getattr(model, "units", None)
    if isinstance(own, list) and all(isinstance(name, str) for name in own):
        return own
    blocks = _outermost(_named_blocks(model) or _repeated_members(model))
    return sorted([*blocks, *_rest(model, blocks)], key=[name for name, _ in model.named_modules()].index)


def _named_blocks(model: nn.Module) -> list[str]:
    """Modules whose class a Hugging Face model says not to split, in it or in any model inside it."""
    classes: set[str] = set()
    for module in model.modules():
        classes |= {str(name) for name in getattr(module, "_no_split_modules", None) or ()}
    return [name for name, module in model.named_modules() if name and type(module).__name__ in classes]


def _repeated_members(model: nn.Module) -> list[str]:
    """Members of lists and sequences that hold parameters and have a brother of the same class."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        holders = {key: child for key, child in module.named_children() if _holds_parameters(child)}
        number = Counter(type(child) for child in holders.values())
        found += [f"{name}.{key}".lstrip(".") for key, child in holders.items() if number[type(child)] > 1]
    return found


def _rest(model: nn.Module, blocks: list[str]) -> Iterator[str]:
    """Modules outside the blocks that hold parameters of their own and have no block inside."""
    taken = list(blocks)
    for name, module in model.named_modules():
        inside = any(name == unit or name.startswith(f"{unit}.") for unit in taken)
        around = any(not name or unit.startswith(f"{name}.") for unit in blocks)
        if not name or inside or around or not any(True for _ in module.parameters(recurse=False)):
            continue
        taken.append(name)
        yield name


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _holds_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
