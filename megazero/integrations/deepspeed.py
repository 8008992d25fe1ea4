"""`import deepspeed` finds megazero, so that scripts written for DeepSpeed run unmodified. Opt-in.

    python -m megazero.integrations.deepspeed script.py args…                     # one process
    torchrun --nproc-per-node 8 -m megazero.integrations.deepspeed script.py args…
    megazero.integrations.deepspeed.install()                                     # before transformers is imported

TABLE says what stands for what. Names are found when they are used. On several CPU ranks transformers' Trainer wants
TrainingArguments(use_cpu=True); without it accelerate counts one process, and initialize() refuses its batch size.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megazero.base.errors import ConfigError

VERSION = "0.19.6+megazero"
"""The DeepSpeed release whose interface this is; transformers and accelerate ask for it."""

OURS = "megazero.integrations.deepspeed_"


def _names(home: str, names: str) -> dict[str, str]:
    """Names that mean the same in `home`; `Theirs=ours` where ours is called otherwise."""
    pairs = [name.split("=") for name in names.split()]
    return {pair[0]: f"{home}:{pair[-1]}" for pair in pairs}


def _absent(remedy: str, names: str) -> dict[str, str]:
    """Names that megazero answers with a remedy."""
    return dict.fromkeys(names.split(), f"!{remedy}")


_PIPE = _names("megazero", "PipelineModule LayerSpec TiedLayerSpec")
_TOPOLOGY = {
    **_names("megazero", "PipeDataParallelTopology PipeModelDataParallelTopology"),
    **_names(OURS + "topology", "ProcessTopology"),
    **_absent(
        "Describe the layout with megazero.Topology.build(pp=…, dp=…, tp=…), and ask it for .coord and .group(axis).",
        "PipelineParallelGrid",
    ),
}
_ENGINE = _names("megazero.engine.engine", "DeepSpeedEngine=Engine PipelineEngine=Engine")
_ZERO = {
    **_names("megazero.zero.context", "GatheredParameters register_external_parameter"),
    **_names("megazero.zero.context", "unregister_external_parameter=register_external_parameter"),
    **_names(OURS + "names", "Init"),
    **_names("megazero.zero.status", "ZeroParamStatus"),
}
_CHECKPOINTING = _names(
    OURS + "checkpointing", "configure is_configured reset checkpoint non_reentrant_checkpoint=checkpoint"
) | _absent(
    "Random numbers need no tracker: a recomputed function starts from the generator state it first had.",
    "get_cuda_rng_tracker model_parallel_cuda_manual_seed model_parallel_reconfigure_tp_seed",
)
_ACCELERATOR = _names(OURS + "accelerator", "get_accelerator")
_LOGGING = _names(OURS + "names", "logger log_dist")
_SCHEDULES = _names(
    "megazero.engine.schedulers", "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR"
) | _names(OURS + "names", "VALID_LR_SCHEDULES")
_CONFIG = _names("megazero.config.deepspeed", "DeepSpeedConfig=read_deepspeed") | _names(
    "megazero.base.errors", "DeepSpeedConfigError=ConfigError"
)
_COMM = _names(OURS + "comm", "init_distributed get_rank get_world_size get_local_rank barrier") | {
    "*": "torch.distributed"
}
_PLAN = "Ask `megazero plan ds_config.json --model …`, which prints the bytes of each stage and offload choice."
_SPREAD_SEQUENCES = "Spread sequences with context parallelism: --context-parallel-size, or Topology.build(cp=…)."

TABLE: dict[str, dict[str, str]] = {
    "deepspeed": {
        **_names("megazero", "init_inference tp_model_init"),
        **_names("megazero.config.arguments", "add_config_arguments"),
        **_names(OURS + "names", "initialize OnDevice"),
        **_names(OURS + "comm", "init_distributed"),
        **_ENGINE,
        **_PIPE,
        **_TOPOLOGY,
        **_CONFIG,
        **_SCHEDULES,
        **_ACCELERATOR,
        **_LOGGING,
        **_absent("Its key autotuning is what `megazero plan` does.", "add_tuning_arguments"),
        **_absent(
            "Write the layer in torch: scaled_dot_product_attention runs the fused kernels of this device.",
            "DeepSpeedTransformerLayer DeepSpeedTransformerConfig",
        ),
    },
    "deepspeed.accelerator": _ACCELERATOR,
    "deepspeed.checkpoint": {},
    "deepspeed.checkpoint.utils": _names(OURS + "names", "clone_tensors_for_torch_save"),
    "deepspeed.checkpointing": _CHECKPOINTING,
    "deepspeed.comm": _COMM,
    "deepspeed.comm.comm": _COMM,
    "deepspeed.launcher": {},
    "deepspeed.launcher.runner": _names(OURS + "names", "DEEPSPEED_ENVIRONMENT_NAME"),
    "deepspeed.moe": {},
    "deepspeed.moe.layer": _names("megazero.models.moe_layer", "MoE"),
    "deepspeed.moe.utils": _names(
        "megazero.models.moe_layer", "split_params_into_different_moe_groups_for_optimizer is_moe_param has_moe_layers"
    ),
    "deepspeed.ops": {},
    "deepspeed.ops.adagrad": _names("megazero.engine.optimizers", "DeepSpeedCPUAdagrad=Adagrad"),
    "deepspeed.ops.adam": _names("megazero.engine.optimizers", "FusedAdam DeepSpeedCPUAdam=CPUAdam"),
    "deepspeed.ops.lamb": _names("megazero.engine.optimizers", "FusedLamb=Lamb"),
    "deepspeed.ops.lion": _names("megazero.engine.optimizers", "FusedLion=Lion DeepSpeedCPULion=Lion"),
    "deepspeed.pipe": _PIPE | _TOPOLOGY,
    "deepspeed.runtime": {},
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": _CHECKPOINTING,
    "deepspeed.runtime.config": _CONFIG,
    "deepspeed.runtime.dataloader": _names(OURS + "names", "RepeatingLoader"),
    "deepspeed.runtime.engine": _ENGINE,
    "deepspeed.runtime.lr_schedules": _SCHEDULES,
    "deepspeed.runtime.pipe": _PIPE | _TOPOLOGY,
    "deepspeed.runtime.pipe.engine": _ENGINE,
    "deepspeed.runtime.pipe.module": _PIPE,
    "deepspeed.runtime.pipe.topology": _TOPOLOGY,
    "deepspeed.runtime.sequence_parallel": {},
    "deepspeed.runtime.sequence_parallel.ulysses_sp": _absent(
        _SPREAD_SEQUENCES, "UlyssesSPAttentionHF UlyssesSPDataLoaderAdapter"
    ),
    "deepspeed.runtime.utils": _names(OURS + "names", "see_memory_usage move_to_device"),
    "deepspeed.runtime.zero": _ZERO,
    "deepspeed.runtime.zero.partition_parameters": {
        **_ZERO,
        **_ACCELERATOR,
        **_names(OURS + "names", "zero_wrapper_for_fp_tensor_constructor"),
        **_names("torch", "_orig_torch_arange=arange _orig_torch_empty=empty"),
        **_names("torch", "_orig_torch_zeros=zeros _orig_torch_ones=ones _orig_torch_full=full"),
    },
    "deepspeed.runtime.zero.stage3": {
        **_names(
            OURS + "memory",
            "estimate_zero3_model_states_mem_needs_all_live estimate_zero3_model_states_mem_needs_all_cold",
        ),
        **_absent(_PLAN, "estimate_zero3_model_states_mem_needs"),
    },
    "deepspeed.runtime.zero.stage_1_and_2": {
        **_names(
            OURS + "memory",
            "estimate_zero2_model_states_mem_needs_all_live estimate_zero2_model_states_mem_needs_all_cold",
        ),
        **_absent(_PLAN, "estimate_zero2_model_states_mem_needs"),
    },
    "deepspeed.utils": {
        **_names(
            "megazero.zero.access",
            "safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state safe_set_full_fp32_param "
            "safe_set_full_grad safe_set_full_optimizer_state",
        ),
        **_names(OURS + "names", "RepeatingLoader set_z3_leaf_modules"),
        **_names("torch.distributed", "is_initialized"),
        **_LOGGING,
    },
    "deepspeed.utils.groups": _names(
        OURS + "groups",
        "_get_data_parallel_group _get_data_parallel_group_ranks _get_data_parallel_rank _get_data_parallel_world_size "
        "get_data_parallel_group get_data_parallel_rank get_data_parallel_world_size _get_model_parallel_world_size "
        "get_model_parallel_group get_model_parallel_rank get_model_parallel_world_size "
        "get_tensor_model_parallel_group get_tensor_model_parallel_rank get_tensor_model_parallel_world_size "
        "get_tensor_model_parallel_src_rank "
        "_get_sequence_parallel_group _get_sequence_parallel_rank _get_sequence_parallel_world_size "
        "_get_sequence_data_parallel_group _get_sequence_data_parallel_rank _get_sequence_data_parallel_world_size "
        "_get_expert_parallel_group _get_expert_parallel_group_ranks _get_expert_parallel_rank "
        "_get_expert_parallel_world_size _get_expert_parallel_src_rank _get_expert_parallel_group_dict "
        "_get_expert_data_parallel_group _get_expert_data_parallel_group_ranks _get_expert_data_parallel_rank "
        "_get_expert_data_parallel_world_size _get_expert_data_parallel_group_dict _get_broadcast_src_rank "
        "_get_expert_broadcast_src_rank _get_max_expert_size _get_max_expert_size_name _get_max_expert_parallel_group",
    )
    | _absent(
        "Experts are laid out by MoE(…, ep_size=…) and the engine; there is nothing to call first.", "initialize"
    ),
    "deepspeed.utils.logging": _LOGGING,
    "deepspeed.zero": _ZERO,
    "deepspeed_chat": {},
    "deepspeed_chat.ppo_trainer": _names(OURS + "chat", "DeepSpeedPPOTrainer")
    | _absent(
        "Train on the pretraining batches between two calls of train_rlhf(): trainer.actor.backward(loss) and .step().",
        "DeepSpeedPPOTrainerUnsupervised",
    ),
    "deepspeed_chat.reward_model": _names("megazero.rlhf.reward", "RewardModel"),
}
"""Module -> name -> `module:name` that it stands for, or `!remedy`. `*`: where all other names are looked for."""

REMEDIES = {
    "megazero:tp_model_init": "initialize() splits the model itself: give it tensor_parallel.tp_size.",
}
"""What to do about what this megazero does not have."""


FOUND_DEEPSPEED: dict[str, Callable[[Any], bool]] = {
    "accelerate.accelerator": lambda module: hasattr(module, "DeepSpeedEngineWrapper"),
    "transformers.integrations.deepspeed": lambda module: module.DeepSpeedConfig is not object,
}
"""Modules that look for DeepSpeed once, when they are imported, and whether they found it."""


def install(force: bool = False) -> None:
    """From now on `import deepspeed` and its submodules give what TABLE says, and package metadata says VERSION.

    Call it before importing transformers or accelerate, which ask for DeepSpeed when they are imported. A second call
    does nothing.

    Args:
        force: take the place of a DeepSpeed that is installed.

    Raises ConfigError when the real one is installed (unless forced) or already imported.
    """
    if _finder() is not None:
        return
    if "deepspeed" in sys.modules:
        raise ConfigError(
            "deepspeed is imported already, and its objects do not mix with megazero's. Call install() before "
            "`import deepspeed`."
        )
    if not force and (version := _real_version()):
        raise ConfigError(
            f"deepspeed {version} is installed here, and `import deepspeed` means it. Run `pip uninstall deepspeed`, "
            "or let megazero take its place in this process: install(force=True)."
        )
    early = [name for name, found in FOUND_DEEPSPEED.items() if name in sys.modules and not found(sys.modules[name])]
    if early:
        warnings.warn(
            f"{' and '.join(early)} was imported before megazero.integrations.deepspeed.install() and found no "
            "DeepSpeed: TrainingArguments(deepspeed=…) and DeepSpeedPlugin will not work. Call install() first.",
            RuntimeWarning,
            stacklevel=2,
        )
    sys.meta_path.insert(0, Finder())


def uninstall() -> None:
    """Undo `install`: `import deepspeed` means again what it meant. What was imported from it stays usable."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    for name in [name for name, module in sys.modules.items() if isinstance(module, Alias)]:
        del sys.modules[name]


def _finder() -> Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, Finder)), None)


def _real_version() -> str | None:
    """The version of a DeepSpeed that is installed; a folder of that name without a package in it is none."""
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec("deepspeed")
        return None if spec is None or spec.origin is None else f"({spec.origin})"


class Alias(ModuleType):
    """One module of TABLE."""

    def __getattr__(self, name: str) -> Any:
        full = f"{self.__name__}.{name}"
        if name == "__all__":
            return [each for each in _offers(self.__name__) if hasattr(self, each)]
        if full in TABLE:
            return importlib.import_module(full)
        names = TABLE[self.__name__]
        if name in names:
            value = _found(full, names[name])
        elif "*" in names and hasattr(wider := importlib.import_module(names["*"]), name):
            value = getattr(wider, name)
        else:
            raise AttributeError(_unknown(self.__name__, name), name=name, obj=self)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_offers(self.__name__)})


def _found(full: str, target: str) -> Any:
    """What a line of TABLE means. Raises AttributeError with a remedy when megazero does not have it."""
    if target.startswith("!"):
        raise AttributeError(f"megazero has no {full}. {target[1:]}")
    home, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{home}.".startswith(f"{error.name}."):
            raise
    except AttributeError:
        pass  # answered below, where the remedy is
    remedy = REMEDIES.get(target, "Upgrade megazero.")
    raise AttributeError(f"{full} stands for {home}.{name}, which this megazero does not have. {remedy}")


def _offers(module: str) -> list[str]:
    """Names of a module of TABLE: its own and its submodules."""
    own = [name for name, target in TABLE[module].items() if name != "*" and not target.startswith("!")]
    return own + [other.rpartition(".")[2] for other in TABLE if other.rpartition(".")[0] == module]


def _unknown(module: str, name: str) -> str:
    """A message about a name that TABLE does not have, with the nearest that it has, here or in another module."""
    here = difflib.get_close_matches(name, _offers(module), n=1, cutoff=0.6)
    elsewhere = [f"{other}.{name}" for other in TABLE if name in _offers(other)]
    near = f"{module}.{here[0]}" if here else elsewhere[0] if elsewhere else ""
    hint = f"Did you mean {near}?" if near else "See TABLE in megazero.integrations.deepspeed for what there is."
    return f"megazero knows no {module}.{name}. {hint}"


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of TABLE, and the metadata of a package of that name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = fullname.partition(".")[0]
        if top not in TABLE or (top != "deepspeed" and _is_elsewhere(top)):
            return None
        if fullname not in TABLE:
            # `from deepspeed.x import y` comes here for a y that Alias refused; an error without `.name` is shown
            raise ModuleNotFoundError(_refusal(fullname))
        return importlib.machinery.ModuleSpec(fullname, self, origin=__name__, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Alias(spec.name, "Stands for DeepSpeed's module of this name.")

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "deepspeed":
            module.__version__ = VERSION  # type: ignore[attr-defined]

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        """Called by importlib.metadata."""
        if context is None or context.name in (None, "deepspeed"):
            yield Metadata()


def _is_elsewhere(package: str) -> bool:
    """Whether the script has a package of this name itself, which then is the one it means."""
    known = sys.modules.get(package)
    if known is not None:
        return not isinstance(known, Alias)
    return importlib.machinery.PathFinder.find_spec(package) is not None


def _refusal(fullname: str) -> str:
    """Why there is no module of this name; its parent is in TABLE."""
    module, _, name = fullname.rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except AttributeError as error:
        return str(error)
    return f"{fullname} is no module. Import it from {module}."


class Metadata(importlib.metadata.Distribution):
    """What importlib.metadata says about the package."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {VERSION}\nSummary: megazero's alias\n",
            "top_level.txt": "deepspeed\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / str(path)


def main(arguments: Sequence[str]) -> None:
    """Run a script (or `-m module`) with the alias installed, as `python` would."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m") or arguments == ["-m"]:
        raise SystemExit("usage: python -m megazero.integrations.deepspeed {script.py | -m module} [arguments …]")
    install()
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    importlib.import_module("megazero.integrations.deepspeed").main(sys.argv[1:])  # not this second copy of it
