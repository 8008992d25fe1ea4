"""`megazero.init_inference()`: a module, and DeepSpeed's keys, to an engine that answers.

settings ─► ranks, Topology(tp) ─► linears split ─► weights cast, spread (zero.stage 3), offloaded ─► checkpoint
engine(ids) and engine.generate(ids) are the module's own; at stage 3 each block's weights are there while it runs
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.base.log import Log
from megazero.config.deepspeed import resolve_deepspeed
from megazero.engine.distributed import join
from megazero.engine.engine import Engine
from megazero.engine.foreign import shard_foreign
from megazero.engine.initialize import facts_of
from megazero.engine.prepare import check_real, check_split, equalize, move_buffers
from megazero.engine.units import units_of
from megazero.inference.generation import Generate
from megazero.inference.graph import GraphedForward
from megazero.inference.settings import DTYPES, InferenceSettings, Source, engine_settings, read_settings
from megazero.inference.weights import load_weights
from megazero.parallel.topology import Topology
from megazero.zero.release import release_model


class InferenceEngine:
    """A module ready to answer. What it lacks, its module has.

    `module` is the one that was given, changed in place: `module.generate` has the engine's limit too.
    """

    def __init__(self, engine: Engine, settings: InferenceSettings) -> None:
        self.engine, self.module, self.settings = engine, engine.module, settings
        self.topology, self.device, self.dtype = engine.topology, engine.device, engine.precision.dtype
        self.module.eval()
        graphs = settings.cuda_graph and self.device.type == "cuda"
        self._forward: Any = GraphedForward(self.module) if graphs else self.module
        if callable(getattr(self.module, "generate", None)):
            zero = engine.zero
            self.module.generate = Generate(  # type: ignore[assignment]
                self.module,
                self.topology,
                self.device,
                limit=settings.max_tokens,
                together=zero.gatherer is not None and zero.group.size > 1,
            )

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, without gradients. Collective over ranks that share its weights."""
        with self.engine.precision.forward():
            return self._forward(*args, **kwargs)

    forward = __call__

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own `generate`. Raises ConfigError for more than max_tokens, or a module without one."""
        if not callable(getattr(self.module, "generate", None)):
            raise ConfigError(
                f"engine.generate(): {type(self.module).__name__} has no generate(). Call engine(ids) and choose from "
                "its logits, or megazero.inference.generate."
            )
        return self.module.generate(*args, **kwargs)  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors under the module's own names, on every rank. Collective."""
        return self.module.state_dict()

    def consolidated_state_dict(self) -> dict[str, Tensor]:
        """The same on rank 0 alone, in CPU memory. Collective."""
        return self.engine.consolidated_state_dict()

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("module")
        if module is None:
            raise AttributeError(name)
        return getattr(module, name)


def init_inference(model: nn.Module | None = None, config: Source | None = None, **kwargs: Any) -> InferenceEngine:
    """Make an inference engine of a module, Hugging Face's for one. Collective over all ranks.

    The settings stand in `config` (a mapping, or the path of a JSON file), in keyword arguments, or in both:

        dtype               of the weights (torch's, or fp32, bf16, fp16); default: the model's own, where DeepSpeed
                            takes fp16
        tensor_parallel.tp_size, mp_size    ranks over which linear layers are split, by the model's plan
        injection_policy    {class of layers: names of its row-parallel linears}, in place of that plan
        replace_with_kernel_inject    let attention run torch's fused kernels
        max_out_tokens, max_tokens    most tokens of prompt and continuation; default: what the model takes
        checkpoint, base_dir          weights to load: a folder, a file, a list of files, or a state dict
        enable_cuda_graph   record engine(…) as a CUDA graph for each shape
        zero                {"stage": 3, "offload_param": {"device": "cpu" | "nvme", "nvme_path": …}}: weights are
                            spread over the ranks, kept in CPU memory or files, and gathered block by block when used

    Raises ConfigError with every problem of the settings, CheckpointError for weights that are not the model's.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"init_inference() needs model=…, the module to ask, not {type(model).__name__}.")
    settings = read_settings(config, kwargs)
    check_real(model)
    dtype = settings.dtype or _own_dtype(model)
    source = engine_settings(settings, dtype)
    _, device = join()
    _check_graph(settings)
    topology = Topology.build(tp=settings.tp_size, device_type=device.type)
    check_split(model, topology)
    log = Log(dist.get_rank() if dist.is_initialized() else 0)
    for key, reason in settings.notes:
        log.main(f"init_inference: {key} has no effect: {reason}")
    _choose_kernels(model, settings, device, log)
    resolved = resolve_deepspeed(source, data_parallel_size=topology.size("dp"), model=facts_of(model))
    release_model(model, "init_inference() of its module")
    model = shard_foreign(model, topology, device, policy=settings.injection_policy)
    if settings.zero.get("stage") == 3:
        equalize(model, topology, device)
    move_buffers(model, device, dtype)
    engine = Engine(model, topology, resolved.config, device, units_of(model), optimizer=None)
    if settings.checkpoint is not None:
        load_weights(model, settings.checkpoint, settings.base_dir)
    return InferenceEngine(engine, settings)


def _own_dtype(model: nn.Module) -> torch.dtype:
    """The type that most of the weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    found = sizes.most_common(1)[0][0] if sizes else torch.float32
    if found not in DTYPES:
        raise ConfigError(f"the model's weights are {found}. Give dtype, one of {', '.join(map(str, DTYPES))}.")
    return found


def _check_graph(settings: InferenceSettings) -> None:
    """Raises ConfigError where a forward does what no graph records."""
    if not settings.cuda_graph:
        return
    if settings.tp_size > 1:
        raise ConfigError("enable_cuda_graph with several tensor-parallel ranks is not available. Use one of the two.")
    if settings.zero.get("stage") == 3:
        raise ConfigError(
            "enable_cuda_graph with zero.stage 3: weights come and go while a block runs, and a graph wants them in "
            "one place. Use one of the two."
        )


def _choose_kernels(model: nn.Module, settings: InferenceSettings, device: torch.device, log: Log) -> None:
    """What replace_with_kernel_inject and enable_cuda_graph mean here, said once."""
    if settings.cuda_graph and device.type != "cuda":
        log.main(f"init_inference: enable_cuda_graph has no effect on {device.type}: calls run op by op")
    if not settings.kernel_inject:
        return
    if settings.injection_policy is not None:
        if log.rank == 0:
            log.warn(
                "init_inference: injection_policy and replace_with_kernel_inject exclude each other; the policy is "
                "followed, and the model's layers keep their code"
            )
        return
    now = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if now == "eager" and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
        now = "sdpa"
    says = {
        None: f"{type(model).__name__} does not say which attention it runs; its layers keep their code",
        "sdpa": "attention runs torch's scaled_dot_product_attention, fused where the device can; other layers keep "
        "their code",
    }
    log.main(
        "init_inference: replace_with_kernel_inject: " + says.get(now, f"attention runs {now}; layers keep their code")
    )
