"""megazero: Megatron's model parallelism and DeepSpeed's ZeRO in one engine.

What a user imports from here is found on first use, so that `import megazero` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megazero import zero
    from megazero.config.arguments import add_config_arguments
    from megazero.engine.distributed import init_distributed
    from megazero.engine.engine import Engine
    from megazero.engine.initialize import initialize
    from megazero.inference.engine import InferenceEngine, init_inference
    from megazero.parallel.layer_spec import LayerSpec, TiedLayerSpec
    from megazero.parallel.pipeline_module import (
        PipeDataParallelTopology,
        PipelineModule,
        PipeModelDataParallelTopology,
    )
    from megazero.parallel.topology import Topology

__all__ = [
    "Engine",
    "InferenceEngine",
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "TiedLayerSpec",
    "Topology",
    "add_config_arguments",
    "init_distributed",
    "init_inference",
    "initialize",
    "zero",
]
_HOMES = {
    "add_config_arguments": "megazero.config.arguments",
    "Engine": "megazero.engine.engine",
    "InferenceEngine": "megazero.inference.engine",
    "init_inference": "megazero.inference.engine",
    "initialize": "megazero.engine.initialize",
    "init_distributed": "megazero.engine.distributed",
    "LayerSpec": "megazero.parallel.layer_spec",
    "TiedLayerSpec": "megazero.parallel.layer_spec",
    "PipelineModule": "megazero.parallel.pipeline_module",
    "PipeDataParallelTopology": "megazero.parallel.pipeline_module",
    "PipeModelDataParallelTopology": "megazero.parallel.pipeline_module",
    "Topology": "megazero.parallel.topology",
}


def __getattr__(name: str) -> Any:
    if name == "zero":  # megazero.zero.Init, as in deepspeed.zero
        return importlib.import_module("megazero.zero")
    if name not in _HOMES:
        raise AttributeError(f"module 'megazero' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
