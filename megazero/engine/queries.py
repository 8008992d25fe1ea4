"""What a script asks of an engine and has it save, under the names that DeepSpeed gave them; and the module's own
attributes, for whatever an engine lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megazero.base.errors import ConfigError
from megazero.base.launch import Launch
from megazero.engine import saving, whole
from megazero.engine.parts import Parts
from megazero.engine.units import units_of


class ConfigView(Mapping[str, Any]):
    """A ds_config by key, the module's configuration by attribute: scripts ask an engine's `config` for either."""

    def __init__(self, source: Mapping[str, Any], own: Any) -> None:
        self._source, self._own = source, own

    def __getitem__(self, key: str) -> Any:
        return self._source[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._own is None:
            raise AttributeError(name)
        return getattr(self._own, name)


class Queries(Parts):
    """See the module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in self.__dict__:
            raise AttributeError(name)
        if name in ("zero", "shards", "owner") and self.__dict__.get("let_go_by"):
            raise ConfigError(
                f"this engine was let go by {self.let_go_by}, and has neither parameters nor an optimizer any more. "
                "Use the engine that the last initialize() returned, or engine.module as an ordinary module. (A "
                "Trainer of transformers keeps this engine: set trainer.model_wrapped = trainer.model before its next "
                "train().)"
            )
        try:
            return getattr(self.module, name)
        except AttributeError:
            raise AttributeError(
                f"neither the engine nor its module ({type(self.module).__name__}) has an attribute {name!r}"
            ) from None

    def train(self, mode: bool = True) -> Any:
        self.module.train(mode)
        return self

    def eval(self) -> Any:
        return self.train(False)

    @property
    def config(self) -> Any:
        """The ds_config that initialize() was given, as a mapping, with the attributes of the module's own config; the
        latter alone if there was none. The settings that the engine works with are `settings`."""
        own = getattr(self.module, "config", None)
        if self.source is not None:
            return ConfigView(self.source, own)
        if own is None:
            raise AttributeError("config")
        return own

    def compile(self, backend: Any = "inductor", compile_kwargs: Mapping[str, Any] | None = None) -> None:
        """torch.compile for each block of the module (each unit that ZeRO gathers); ZeRO's own work stays outside."""
        modules = dict(self.module.named_modules())
        blocks = [modules[name] for name in units_of(self.module) if name in modules and list(modules[name].children())]
        for block in blocks or [self.module]:
            block.forward = torch.compile(block.forward, backend=backend, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """Give the module back as an ordinary one, with the weights of the last step and without hooks, and free
        masters, optimizer states, gradients and files. The engine is of no more use. Collective.

        At stages 0-2 parameters are whole, in the model's type. At stage 3 they are slices as `megazero.zero.Init`
        leaves them: `GatheredParameters` shows their values, and `initialize` takes them over. `initialize` on a module
        that an engine holds does the same by itself, and from 16-bit models takes the fp32 masters. `del engine` frees
        nothing while the module lives, whose hooks hold the engine.

        Raises ConfigError inside a GatheredParameters block.
        """
        self.let_go("engine.destroy()")

    # counters and sizes

    @property
    def local_rank(self) -> int:
        """This process's number on its machine."""
        return Launch.from_environment().local_rank

    @property
    def global_rank(self) -> int:
        return self.topology.rank

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def dp_world_size(self) -> int:
        """Ranks that see different data."""
        return self.topology.size("dp")

    @property
    def global_steps(self) -> int:
        """Updates so far, the skipped ones too."""
        return self.accumulation.global_steps

    @property
    def skipped_steps(self) -> int:
        """Updates that changed no weight because of a number that was not finite."""
        return self.accumulation.skipped_steps

    @property
    def micro_steps(self) -> int:
        return self.accumulation.micro_steps

    @property
    def global_samples(self) -> int:
        return self.global_steps * self.train_batch_size()

    def train_batch_size(self) -> int:
        """Samples of one update over all ranks."""
        return self.train_micro_batch_size_per_gpu() * self.gradient_accumulation_steps() * self.dp_world_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.settings.training.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation.steps

    def zero_optimization_stage(self) -> int:
        return self.settings.parallel.zero_stage

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def gradient_clipping(self) -> float:
        return self.max_norm

    def fp16_enabled(self) -> bool:
        return self.precision.dtype == torch.float16

    def bfloat16_enabled(self) -> bool:
        return self.precision.dtype == torch.bfloat16

    # the last step

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by; 1 without loss scaling."""
        return 1.0 if self.scaler is None else self.scaler.scale

    @property
    def cur_scale(self) -> float:
        return self.loss_scale

    @property
    def overflow(self) -> bool:
        """Whether the last update found gradients that were not finite."""
        return self.last is not None and self.last.overflow

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the whole gradient of the last update, unscaled, before clipping; None before the first."""
        return None if self.last is None else self.last.grad_norm

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def training_dataloader(self) -> Any:
        """What train_batch() takes its data from: made of training_data, or given to set_dataloader()."""
        return self.feed.loader

    # weights as ordinary tensors

    def state_dict(self) -> dict[str, Any]:
        """The module's own state dict, of whole tensors, at every stage. Collective at stage 3, where they are copies
        on every rank; `consolidated_state_dict` needs that room on one rank only, in CPU memory."""
        found: dict[str, Any] = self.zero.model.state_dict()
        return found

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
        """Take whole tensors by the module's own names, into fp32 masters and weights. Every rank gives all of them.

        Returns (missing_keys, unexpected_keys); with `strict` raises RuntimeError, as torch does, when there are any.
        """
        return self.zero.model.load_state_dict(state_dict, strict)

    def consolidated_state_dict(
        self, fp32: bool = False, *, exclude_frozen_parameters: bool = False
    ) -> dict[str, Tensor]:
        """The whole model on rank 0, in CPU memory, under the module's own names: in the weights' type, or the fp32
        masters. An empty dict on the other ranks. Collective over the world."""
        return whole.consolidated(self.module, self.zero, fp32=fp32, exclude_frozen=exclude_frozen_parameters)

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        return self.consolidated_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        return self.consolidated_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """True: whole weights can be had at every stage."""
        return True

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write `consolidated_state_dict()` with torch.save, by rank 0. Collective. Returns True."""
        return saving.save_weights(self, save_dir, save_filename, exclude_frozen_parameters)

    # checkpoints

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save all that training goes on from, as `save_dir`/`tag`. Collective.

        Weights, optimizer, scheduler, loss scale, counters, position in the data, random states, frozen parameters
        (unless excluded), persistent buffers, the resolved configuration and the caller's `client_state` (numbers,
        strings, tensors, lists, tuples, dicts). It appears whole or not at all.

        Args:
            tag: name of the checkpoint; by default global_step<N>.
            save_latest: make it the one that `load_checkpoint` takes by default.

        Returns True. Raises CheckpointError on every rank when any cannot write.
        """
        saving.save(self, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        *,
        if_exists: bool = False,
    ) -> tuple[str | None, dict[str, Any]]:
        """Go on from a checkpoint that any number of ranks saved at any stage. Collective.

        Gradients are no part of it: an accumulation begins anew, and those of the engine's own are forgotten.

        Args:
            tag: which; by default the one that `latest` names.
            load_module_strict: the model has exactly the tensors of the checkpoint; otherwise what both have is taken.
            load_module_only: weights and buffers, nothing of the training.
            if_exists: a folder without a checkpoint gives (None, {}) instead of an error.

        Returns (the checkpoint's path, client_state). Raises CheckpointError when there is none, it is damaged, or of
        another model.
        """
        parts = saving.Wanted(load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only)
        return saving.load(self, load_dir, tag, parts, if_exists=if_exists)
