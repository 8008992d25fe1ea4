"""Which layers of a module from elsewhere are split over tp, and how: its plan, checked against its sizes.

Hugging Face's `_tp_plan`                 "layers.*.self_attn.q_proj": "colwise"  (each model has its own)
table of what has none                    GPT-2
a user's policy {LayerClass: ("self_attn.o_proj", "mlp.down_proj")}    these row-wise, other linears column-wise
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megazero.base.errors import ConfigError
from megazero.parallel.foreign import is_conv1d, sizes_of

COLUMN, ROW = "colwise", "rowwise"
STYLES = {
    COLUMN: COLUMN,
    "colwise_gather_output": "colwise_gather_output",
    "colwise_rep": "colwise_gather_output",
    ROW: ROW,
    "rowwise_split_input": "rowwise_split_input",
    "rowwise_rep": "rowwise_split_input",
    "replicated_with_grad_allreduce": "sum_gradients",
    "embedding_rowwise": "whole",
    "embedding_colwise": "whole",
    "replicate": "whole",
}
"""Hugging Face's style -> ours. Embeddings stay whole on every rank, which changes no number."""

TABLE: dict[str, dict[str, str]] = {
    "GPT2Model": {"h.*.attn.c_attn": COLUMN, "h.*.attn.c_proj": ROW, "h.*.mlp.c_fc": COLUMN, "h.*.mlp.c_proj": ROW},
}
"""Plans of models that carry none, by class."""

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads", "split_size")
"""Attributes of attention modules without a plan of their own that count what each rank has a part of."""

Policy = Mapping[type[nn.Module] | str, str | Sequence[str]]


@dataclass(frozen=True)
class Split:
    """What happens to one module."""

    name: str
    module: nn.Module
    style: str
    packed: int = 1
    """Matrices side by side: GPT-2's q, k, v."""
    heads: int | None = None
    """Heads that are divided, where it belongs to an attention; None: features are."""

    @property
    def splits(self) -> bool:
        return self.style.startswith(("colwise", "rowwise"))

    @property
    def grains(self) -> int:
        """What tp must divide."""
        into, out = sizes_of(self.module)
        return self.heads or (out // self.packed if self.style.startswith("colwise") else into)

    def describe(self) -> str:
        kind = "heads" if self.heads else "features"
        return f"the {self.grains} {kind} of {self.name}"


@dataclass(frozen=True)
class Plan:
    """What happens to a model, by module; `counts`: attention modules whose attributes in COUNTS are divided."""

    splits: list[Split]
    counts: list[nn.Module]


def plan_of(model: nn.Module, policy: Policy | None, ranks: int) -> Plan:
    """The plan for so many tp ranks: the policy's, else the model's own, else the table's.

    Raises ConfigError when there is none, it matches nothing, has a style that is not known here, names something that
    is no linear layer, or `ranks` does not divide heads and features.
    """
    plan = _from_policy(model, policy) if policy is not None else _from_names(model, ranks)
    _check_sizes(model, plan.splits, ranks)
    return plan


def _from_names(model: nn.Module, ranks: int) -> Plan:
    names, tabled = _named_styles(model)
    if not names:
        raise ConfigError(
            f"tensor_parallel.tp_size {ranks} with a {type(model).__name__}: modules from elsewhere are not split "
            "without a plan, which Hugging Face's models carry (Llama, Mistral, Qwen, Gemma …; GPT-2 is known). Set "
            'model._tp_plan = {"layers.*.fc1": "colwise", "layers.*.fc2": "rowwise"}, or use tp_size 1 with ZeRO stage '
            "3, a model of megazero.models (pretrain_gpt.py), or an mpu with layers that are split already."
        )
    splits: dict[str, Split] = {}
    problems: list[str] = []
    parents, patterns = dict(model.named_modules()), [(_pattern(name), style) for name, style in names.items()]
    parameters = [name for name, _ in model.named_parameters()]
    for pattern, style in patterns:
        found = [name for name in parents if pattern.fullmatch(name)]
        if style not in STYLES and (found or any(pattern.fullmatch(name) for name in parameters)):
            problems.append(_unknown_style(pattern, style))
        for name in found if style in STYLES else []:
            splits[name] = _split(parents, name, STYLES[style])
    problems += [_no_linear(split) for split in splits.values() if split.splits and not _is_linear(split.module)]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    if not any(split.splits for split in splits.values()):
        raise ConfigError(
            f"the tensor-parallel plan of {type(model).__name__} matches none of its modules (it begins with "
            f"{next(iter(names))!r}). Correct model._tp_plan, or use tp_size 1."
        )
    return Plan(list(splits.values()), _holders(parents, splits.values()) if tabled else [])


def _named_styles(model: nn.Module) -> tuple[dict[str, str], bool]:
    """Pattern of names -> style, of all plans in the model, the outermost first; and whether they are the table's."""
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        own = getattr(module, "_tp_plan", None)
        for name, style in (own or {}).items():
            names.setdefault(f"{path}.{name}".lstrip("."), style)
    if any(STYLES.get(style) != "whole" for style in names.values()):
        return names, False
    return {
        f"{path}.{name}".lstrip("."): style
        for path, module in model.named_modules()
        for name, style in TABLE.get(type(module).__name__, {}).items()
    }, True


def _from_policy(model: nn.Module, policy: Policy) -> Plan:
    """The linears that it names row-wise, the other linears of the same layers column-wise."""
    parents = dict(model.named_modules())
    splits: dict[str, Split] = {}
    problems: list[str] = []
    for kind, given in policy.items():
        rows = (given,) if isinstance(given, str) else given
        if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, str) for row in rows):
            problems.append(
                f"injection_policy[{_called(kind)}] is {given!r}. Give the names of its row-parallel linears."
            )
            continue
        layers = {name: layer for name, layer in parents.items() if _is_a(layer, kind)}
        if not layers:
            classes = ", ".join(sorted({type(module).__name__ for module in parents.values()}))
            problems.append(
                f"injection_policy names {_called(kind)}, of which the model has none. Give one of its classes: "
                f"{classes}."
            )
        for name, layer in layers.items():
            inside = {
                f"{name}.{part}".lstrip("."): part for part, module in layer.named_modules() if _is_linear(module)
            }
            missing = [row for row in rows if row not in inside.values()]
            if missing:
                problems.append(
                    f"injection_policy: {_called(kind)} has no linear layer {', '.join(missing)}. It has "
                    f"{', '.join(inside.values()) or 'none'}."
                )
            for full, part in inside.items():
                splits[full] = _split(parents, full, ROW if part in rows else COLUMN)
    if problems or not splits:
        raise ConfigError(*(dict.fromkeys(problems) or ["injection_policy is empty: nothing is split. Leave it out."]))
    return Plan(list(splits.values()), _holders(parents, splits.values()))


def _split(modules: Mapping[str, nn.Module], name: str, style: str) -> Split:
    module, holder = modules[name], modules[name.rpartition(".")[0]] if name else None
    if not style.startswith(("colwise", "rowwise")) or not _is_linear(module):
        return Split(name, module, style)
    into, out = sizes_of(module)
    packed = 1
    if is_conv1d(module) and style == COLUMN and isinstance(size := getattr(holder, "split_size", None), int):
        packed = max(out // size, 1)
    head = getattr(holder, "head_dim", None)
    width = out // packed if style == COLUMN else into
    heads = width // head if style in (COLUMN, ROW) and isinstance(head, int) and width % head == 0 else None
    return Split(name, module, style, packed, heads)


def _holders(modules: Mapping[str, nn.Module], splits: Any) -> list[nn.Module]:
    """The modules in which a column-wise linear stands."""
    return [modules[name] for name in dict.fromkeys(s.name.rpartition(".")[0] for s in splits if s.style == COLUMN)]


def _check_sizes(model: nn.Module, splits: list[Split], ranks: int) -> None:
    """Raises ConfigError where `ranks` does not divide what is split."""
    needed = [split for split in splits if split.splits and not is_output(split)]
    bad = [split for split in needed if split.grains % ranks]
    if not bad:
        return
    common = math.gcd(*(split.grains for split in needed))
    fits = [size for size in range(1, common + 1) if common % size == 0]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    raise ConfigError(
        f"tensor_parallel.tp_size {ranks} does not divide {bad[0].describe()}{more}. Sizes that fit this "
        f"{type(model).__name__}: {', '.join(map(str, fits))}."
    )


def is_output(split: Split) -> bool:
    """Whether it may as well stay whole: its result is whole on every rank anyway (the output layer)."""
    return split.style == "colwise_gather_output"


def _pattern(name: str) -> re.Pattern[str]:
    """`layers.*.q_proj`: a star stands for one part of a name."""
    return re.compile(r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in name.split(".")))


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _is_a(module: nn.Module, kind: type[nn.Module] | str) -> bool:
    return type(module).__name__ == kind if isinstance(kind, str) else isinstance(module, kind)


def _called(kind: type[nn.Module] | str) -> str:
    return kind if isinstance(kind, str) else kind.__name__


def _unknown_style(pattern: re.Pattern[str], style: str) -> str:
    name = pattern.pattern.replace(r"\.", ".").replace("[^.]+", "*").replace("\\", "")
    experts = " Experts are not split over tensor-parallel ranks yet." if "experts" in name or "moe" in style else ""
    return (
        f"the model's tensor-parallel plan wants {name} {style!r}; known are {', '.join(sorted(STYLES))}.{experts} Use "
        "tp_size 1 with ZeRO stage 3, which spreads every parameter."
    )


def _no_linear(split: Split) -> str:
    kind = type(split.module)
    return (
        f"{split.name} is a {kind.__module__}.{kind.__qualname__}, which is not split over tensor-parallel ranks: only "
        "nn.Linear and Conv1D are. Wrap or quantize the model without tensor parallelism (tp_size 1, ZeRO stage 3)."
    )
