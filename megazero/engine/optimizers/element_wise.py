"""Whether an optimizer treats each element by itself, which is what ZeRO's flat cuts need. Found by trying.

    whole      one optimizer  over [4, 6]                       3 steps      equal, element by element?
    cut        two optimizers over elements [0, 10), [10, 24)   3 steps      then ranks may hold cuts

Each cut has an optimizer of its own, as each rank has, so numbers shared over all parameters (Prodigy's, say) show too.
The same trial tells which states an optimizer keeps.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from megazero.engine.optimizers.cuts import start_states
from megazero.engine.optimizers.fused import SGD, Adagrad, Adam, AdamW, CPUAdam, FusedAdam
from megazero.engine.optimizers.lion import Lion

_OPTIM = torch.optim
ELEMENT_WISE = frozenset(
    {_OPTIM.SGD, _OPTIM.Adam, _OPTIM.AdamW, _OPTIM.Adagrad, _OPTIM.RMSprop, _OPTIM.Adadelta, _OPTIM.Adamax}
    | {_OPTIM.NAdam, _OPTIM.RAdam, _OPTIM.Rprop, _OPTIM.ASGD}
    | {SGD, Adam, AdamW, Adagrad, FusedAdam, CPUAdam, Lion}
)
"""Classes (themselves, not what derives from them) that need no trying."""
_REASONS: dict[type, str] = {
    _OPTIM.LBFGS: "it keeps a history over all parameters, and needs a closure",
    _OPTIM.SparseAdam: "it takes sparse gradients, and ZeRO's are dense",
    _OPTIM.Adafactor: "it keeps its second moments by rows and columns of a matrix",
    _OPTIM.Muon: "it orthogonalises whole matrices; megazero's own Muon does that over cuts (type Muon)",
}
_REMEDY = (
    "Take an element-wise optimizer (AdamW, Lion, SGD, …) or megazero's Lamb or Muon; or, if you know that it is "
    "element-wise, say so: set element_wise = True on its class."
)
_CUT = 10  # not a multiple of any vector width
_BASE = frozenset({"param_groups", "state", "defaults", "step"})
_HOOKS = tuple(
    f"_optimizer_{what}_{when}_hooks" for what in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
)


class _CannotTry(Exception):
    """Why an optimizer cannot be tried, as the end of a sentence."""


def is_element_wise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether flat cuts of its parameters can be stepped apart. Touches neither the optimizer nor random numbers."""
    return element_wise_problem(optimizer) is None


def element_wise_problem(optimizer: torch.optim.Optimizer) -> str | None:
    """None for an element-wise optimizer, else why it is not one and what to do, as sentences.

    An attribute `element_wise` (True or False) of the optimizer or its class is believed.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):  # a wrapper, such as accelerate's
        return element_wise_problem(inner)
    kind = type(optimizer)
    said = getattr(optimizer, "element_wise", None)
    if said is not None and not said:
        return f"{kind.__name__} says of itself that it is not element-wise (element_wise = False). {_REMEDY}"
    if said or kind in ELEMENT_WISE or _is_eight_bit(kind):
        return None
    if getattr(optimizer, "whole_tensors", False):
        return f"{kind.__name__} is not element-wise: it steps on whole parameters. {_REMEDY}"
    for known, reason in _REASONS.items():
        if isinstance(optimizer, known):
            return f"{kind.__name__} is not element-wise: {reason}. {_REMEDY}"
    if any(p.default is p.empty for p in list(inspect.signature(kind.step).parameters.values())[1:] if _named(p)):
        return f"{kind.__name__}.step needs arguments (a closure?), which ZeRO's step has none for. {_REMEDY}"
    try:
        different = _worst_difference(optimizer)
    except _CannotTry as reason:
        return f"whether {kind.__name__} is element-wise could not be tried: {reason}. {_REMEDY}"
    if different is None:
        return None
    return (
        f"{kind.__name__} is not element-wise: a [4, 6] parameter and two flat cuts of it differ by {different:.2g} "
        f"after 3 steps. {_REMEDY}"
    )


def _is_eight_bit(kind: type) -> bool:
    """Adams and Lions of the two packages are, up to the blocks that they quantise; trying them compiles kernels."""
    package, name = kind.__module__.split(".")[0], kind.__name__
    return package in ("bitsandbytes", "torchao") and name.startswith(("Adam", "PagedAdam", "Lion", "PagedLion"))


def _named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _worst_difference(optimizer: torch.optim.Optimizer) -> float | None:
    """Over the optimizer's kinds of groups; None when whole and cut agree."""
    tried: list[dict[str, Any]] = []
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    with _untouched(device):
        for group in optimizer.param_groups:
            options = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr", "initial_lr")}
            if repr(options) in map(repr, tried):
                continue
            tried.append(options)
            whole, cut = _trained(optimizer, group, device, [24]), _trained(optimizer, group, device, [_CUT, 24])
            worst = float((whole - cut).abs().max())
            if not worst <= 2e-5 * float(whole.abs().max()):  # NaN is a difference too
                return worst
    return None


def kept_states(optimizer: torch.optim.Optimizer, settings: Iterable[Mapping[str, Any]]) -> set[str] | None:
    """Names of the per-element states that the optimizer keeps for groups with these hyper-parameters; None where it
    cannot be tried."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return kept_states(inner, settings)
    if _is_eight_bit(type(optimizer)):
        return None
    names: set[str] = set()
    try:
        with _untouched(torch.device("cpu")):
            for group, values in zip(optimizer.param_groups, settings, strict=False):
                weight = nn.Parameter(torch.ones(4, 6))
                twin = _twin(optimizer, {**group, **values}, weight)
                _step(twin, weight, torch.ones(4, 6))
                names |= {key for key, value in twin.state[weight].items() if isinstance(value, Tensor) and value.dim()}
    except _CannotTry:
        return None
    return names


@contextlib.contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Trials on this device draw from random states of their own, and are seen by nobody."""
    python_random = random.getstate()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad(), _without_global_hooks():
            yield
    finally:
        random.setstate(python_random)


@contextlib.contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Hooks that the user registered for all optimizers do not see the trial."""
    hooks = [getattr(torch_optimizer, f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)


def _trained(optimizer: torch.optim.Optimizer, group: dict[str, Any], device: torch.device, ends: list[int]) -> Tensor:
    """[24] weights after 3 steps, held in ranges that end at `ends`, each by a copy of the optimizer of its own."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([1.0, 0.1, 3.0, 0.3]).repeat_interleave(6)  # so that rows differ, for factored moments
    start = torch.randn(24, generator=generator) * sizes.flip(0)
    gradients = [(torch.randn(24, generator=generator) * sizes).to(device) for _ in range(3)]
    trained, begin = [], 0
    for end in ends:
        shape = (4, 6) if end - begin == 24 else (end - begin,)
        weight = nn.Parameter(start[begin:end].reshape(shape).to(device))
        twin = _twin(optimizer, group, weight)
        for gradient in gradients:
            _step(twin, weight, gradient[begin:end].reshape(shape).clone())
        trained.append(weight.detach().flatten())
        begin = end
    return torch.cat(trained)


def _step(twin: torch.optim.Optimizer, weight: nn.Parameter, gradient: Tensor) -> None:
    weight.grad = gradient
    try:
        type(twin).step(twin)  # not twin.step, which a scheduler may have wrapped
    except Exception as error:
        raise _CannotTry(f"its step on small tensors failed ({type(error).__name__}: {error})") from error


def _twin(optimizer: torch.optim.Optimizer, group: dict[str, Any], weight: nn.Parameter) -> torch.optim.Optimizer:
    """A copy of the optimizer with this one parameter in a group like `group`, without state, hooks or wrapped step."""
    twin = type(optimizer).__new__(type(optimizer))
    memo: dict[int, Any] = {id(p): weight for each in optimizer.param_groups for p in each["params"]}
    memo[id(optimizer)] = twin
    for name, value in vars(optimizer).items():
        if name in _HOOKS:
            vars(twin)[name] = OrderedDict()
        elif name not in _BASE:
            vars(twin)[name] = _copied(name, value, memo)
    options = {
        name: _copied(name, value, memo) for name, value in group.items() if name not in ("params", "param_names")
    }
    if options.get("lr") is not None:  # it may be 0 at the start of a warmup, when everything would look equal
        options["lr"] = torch.full_like(options["lr"], 1e-2) if isinstance(options["lr"], Tensor) else 1e-2
    twin.defaults = _copied("defaults", optimizer.defaults, memo)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**options, "params": [weight]}]
    start_states(twin)
    return twin


def _copied(name: str, value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception as error:
        raise _CannotTry(f"its attribute {name!r} cannot be copied ({type(error).__name__}: {error})") from error
