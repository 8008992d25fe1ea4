"""A forward recorded as a CUDA graph: one launch replays all of its kernels.

call with new shapes ─► warm up on a side stream ─► capture          known shapes ─► copy inputs in ─► replay
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3  # calls before the capture: libraries allocate and choose their kernels then


class GraphedForward:
    """`forward` by CUDA graphs, one for each set of shapes and of values that are no tensors.

    What it returns is copied out of the graph's memory. The forward must not look at the values of its inputs.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (str(tree), *((x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves))
        if key not in self._recorded:
            self._recorded[key] = self._record(leaves, tree)
        graph, inputs, outputs = self._recorded[key]
        for inner, given in zip(inputs, tensors, strict=True):
            inner.copy_(given)
        graph.replay()
        return pytree.tree_map_only(Tensor, torch.clone, outputs)

    def _record(self, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        own = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(own, tree)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.forward(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.forward(*args, **kwargs)
        return graph, [leaf for leaf in own if isinstance(leaf, Tensor)], outputs
