"""Layers that are described before they are built, and their cut into stages.

    LayerSpec(Block, 64, heads=4)  ─ on meta ─► parameters ─► cost ─► cut ─► built for real where its stage is

As in DeepSpeed's pipeline API. FLOPs of foreign layers are not known before data is, so the cost of one is its number
of parameters plus one: layers without parameters are spread, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.plan.cut import balanced, uniform

METHODS = ("cost", "parameters", "uniform", "type:<regex>")


class LayerSpec:
    """`cls(*args, **kwargs)`, to be built on the ranks that hold its stage, and there only."""

    def __init__(self, cls: type[nn.Module], /, *args: Any, **kwargs: Any) -> None:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ConfigError(
                f"LayerSpec({cls!r}): takes a class of torch.nn.Module and its arguments. Give the class, not an "
                "instance; ready modules and functions stand in the list of layers without a LayerSpec."
            )
        self.cls, self.args, self.kwargs = cls, args, kwargs

    def build(self) -> nn.Module:
        """A new module, on torch's default device."""
        return self.cls(*self.args, **self.kwargs)

    def call(self, module: nn.Module, x: Any) -> Any:
        """The layer's output."""
        return module(x)


class TiedLayerSpec(LayerSpec):
    """A layer that shares weights with the other layers of the same key, on whichever stages they are.

    Args:
        forward_fn: how the layer is called: `forward_fn(module, x)`; default `module(x)`.
        tied_weight_attr: the shared parameters, by attribute name, dots allowed; what else the module has is its own.
    """

    def __init__(
        self,
        key: str,
        cls: type[nn.Module],
        /,
        *args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = "weight",
        **kwargs: Any,
    ) -> None:
        super().__init__(cls, *args, **kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.attributes = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)

    def call(self, module: nn.Module, x: Any) -> Any:
        return module(x) if self.forward_fn is None else self.forward_fn(module, x)

    def weights(self, module: nn.Module) -> list[nn.Parameter]:
        """The shared parameters of a module that was built. Raises ConfigError if they are not there."""
        found: list[nn.Parameter] = []
        for attribute in self.attributes:
            value: Any = module
            for part in attribute.split("."):
                value = getattr(value, part, None)
            if not isinstance(value, nn.Parameter):
                names = ", ".join(name for name, _ in module.named_parameters()) or "none"
                raise ConfigError(
                    f"TiedLayerSpec({self.key!r}, {self.cls.__name__}): tied_weight_attr {attribute!r} is no parameter "
                    f"of it. Name one of its parameters: {names}."
                )
            found.append(value)
        return found


Layer = LayerSpec | nn.Module | Callable[[Any], Any]


def name_of(layer: Layer) -> str:
    """The class of a layer, or a function's name."""
    if isinstance(layer, LayerSpec):
        return layer.cls.__name__
    return type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", repr(layer))


def plain(x: Any) -> Any:
    """What one layer hands to the next: a tensor, or a tuple of two and more."""
    if isinstance(x, list | tuple):
        return x[0] if len(x) == 1 else tuple(x)
    return x


class MetaLayer:
    """A layer on the meta device: what it holds and what comes out of it, without memory or work."""

    def __init__(self, layer: Layer, index: int) -> None:
        self.layer, self.index = layer, index
        self.module: nn.Module | None = layer if isinstance(layer, nn.Module) else None
        if isinstance(layer, LayerSpec):
            with torch.device("meta"), self._explained("be built"):
                self.module = layer.build()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters()) if self.module is not None else 0

    def __call__(self, x: Any, dtype: torch.dtype) -> Any:
        """What the layer makes of `x` (on meta) with parameters of this type."""
        with self._explained("run"):
            if self.module is None:
                return plain(self.layer(x))  # type: ignore[operator]
            call: Any = self.layer.call if isinstance(self.layer, LayerSpec) else _call
            state = {name: _like(p, dtype) for name, p in self.module.named_parameters()}
            state |= {name: _like(b, b.dtype) for name, b in self.module.named_buffers()}
            return plain(torch.func.functional_call(_Calling(self.module, call), _prefixed(state), (x,)))

    def _explained(self, what: str) -> _Explained:
        return _Explained(f"layer {self.index} ({name_of(self.layer)})", what)


class _Explained:
    """Turns an error of a layer on meta into one that says what to do."""

    def __init__(self, layer: str, what: str) -> None:
        self.layer, self.what = layer, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise ConfigError(
                f"{self.layer} cannot {self.what} on torch's meta device, from which the sizes of layers and of what "
                f"goes between stages are known: {type(error).__name__}: {error}. Keep to tensor operations whose "
                "shapes do not depend on values, make tensors on the device of the input, and change no input in place."
            ) from error


class _Calling(nn.Module):
    """A module and how it is called, for functional_call."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Any) -> Any:
        return self.call(self.module, x)


def _call(module: nn.Module, x: Any) -> Any:
    return module(x)


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, dtype=dtype, device="meta").requires_grad_(tensor.requires_grad)


def partition(method: str, layers: Sequence[Layer], parameters: Sequence[int], stages: int) -> list[int]:
    """Number of layers of each stage.

    cost        parameters + 1 of each layer, balanced
    parameters  parameters alone
    uniform     the same number of layers
    type:regex  the same number of layers whose class (or function) name the regex finds, whatever its case

    Raises ConfigError when there are too few layers, or no such method.
    """
    if len(layers) < stages:
        raise ConfigError(
            f"{len(layers)} layers do not make {stages} stages: each holds at least one. Use at most {len(layers)} "
            "stages (pipeline ranks times virtual stages), or split layers."
        )
    if method == "uniform":
        return uniform(len(layers), stages)
    if method in ("cost", "parameters"):
        return balanced([count + (method == "cost") for count in parameters], stages)
    if not method.startswith("type:"):
        raise ConfigError(f"partition_method {method!r} is none of {', '.join(METHODS)}. Use one of these.")
    pattern = method.removeprefix("type:")
    try:
        found = [re.search(pattern, name_of(layer), re.IGNORECASE) is not None for layer in layers]
    except re.error as error:
        raise ConfigError(f"partition_method {method!r}: {error}. Write a Python regular expression.") from error
    if sum(found) < stages:
        names = ", ".join(sorted({name_of(layer) for layer in layers}))
        raise ConfigError(
            f"partition_method {method!r} finds {sum(found)} of {len(layers)} layers for {stages} stages: each needs "
            f"one. Layers here: {names}. Use another expression, fewer stages, or partition_method 'cost'."
        )
    return balanced([float(match) for match in found], stages)
