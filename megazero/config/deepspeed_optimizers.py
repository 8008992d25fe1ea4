"""The sections `optimizer` and `scheduler` of a ds_config: their types, their parameters, and what "auto" means there.

    {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}}

Values are checked where the object is made; here, before torch is loaded, their names are.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megazero.config.decode import did_you_mean
from megazero.config.deepspeed_reading import AUTO, Reading


@dataclass(frozen=True)
class Named:
    """An optimizer or scheduler by name."""

    type: str
    """As the file writes it."""
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def folded(self) -> str:
        """The type in lower case and without underscores; types are told apart by that."""
        return self.type.replace("_", "").lower()


_ADAM = "lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused"
_FUSED = "lr betas eps weight_decay amsgrad maximize bias_correction adam_w_mode"
_LAMB = "lr bias_correction betas eps eps_inside_sqrt weight_decay max_coeff min_coeff"
OPTIMIZERS: dict[str, str] = {
    "adam": f"{_ADAM} decoupled_weight_decay torch_adam adam_w_mode bias_correction",
    "adamw": f"{_ADAM} torch_adam adam_w_mode bias_correction",
    "fusedadam": f"{_FUSED} set_grad_none",
    "cpuadam": f"{_FUSED} adamw_mode fp32_optimizer_states",
    "deepspeedcpuadam": f"{_FUSED} adamw_mode fp32_optimizer_states",
    "adagrad": "lr lr_decay weight_decay initial_accumulator_value eps foreach maximize differentiable fused",
    "lamb": _LAMB,
    "fusedlamb": _LAMB,
    "lion": "lr betas weight_decay",
    "fusedlion": "lr betas weight_decay",
    "sgd": "lr momentum dampening weight_decay nesterov maximize foreach differentiable fused",
    "muon": "lr weight_decay momentum nesterov ns_coefficients ns_eps ns_steps adjust_lr_fn muon_lr adam_lr betas eps",
    "adam8bit": "lr betas eps weight_decay backend amsgrad block_size bf16_stochastic_round",
    "adamw8bit": "lr betas eps weight_decay backend amsgrad block_size bf16_stochastic_round",
}
"""Type, folded -> names of its parameters."""
OTHER_OPTIMIZERS = ("adadelta", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop", "adafactor")
"""torch.optim's others, whose parameters torch checks."""
_COMPRESSED = {
    "onebitadam": "AdamW",
    "zerooneadam": "AdamW",
    "onebitlamb": "Lamb",
    "muadam": "AdamW",
    "muadamw": "AdamW",
    "musgd": "SGD",
}

_WARMUP = "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type last_batch_iteration"
SCHEDULERS: dict[str, str] = {
    "lrrangetest": "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase "
    "last_batch_iteration",
    "onecycle": "cycle_min_lr cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size "
    "cycle_first_stair_count cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom "
    "decay_mom_rate last_batch_iteration",
    "warmuplr": _WARMUP,
    "warmupdecaylr": f"total_num_steps {_WARMUP}",
    "warmupcosinelr": "total_num_steps warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type "
    "last_batch_iteration",
}
OTHER_SCHEDULERS = (
    "steplr",
    "multisteplr",
    "constantlr",
    "linearlr",
    "exponentiallr",
    "polynomiallr",
    "cosineannealinglr",
    "cosineannealingwarmrestarts",
    "cycliclr",
    "onecyclelr",
)
"""torch.optim.lr_scheduler's that take numbers only."""
_SPELT = {
    "optimizer": "Adam AdamW FusedAdam CPUAdam Adagrad Lamb Lion SGD Muon Adam8bit AdamW8bit",
    "scheduler": "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR",
}


def read_named(reading: Reading, section: str) -> Named | None:
    """The section `optimizer` or `scheduler`, its type and parameter names checked; None when there is none."""
    raw = reading.named.get(section)
    if raw is None:
        return None
    extra = [name for name in raw if name not in ("type", "params", "legacy_fusion")]
    for name in extra:
        near = did_you_mean(name, ["type", "params"])
        reading.problem(f"{section}.{name}", f"unknown key.{near or ' Parameters stand under params.'}")
    if "legacy_fusion" in raw:
        reading.ignored.append((f"{section}.legacy_fusion", "torch's fused kernels are taken where there are any"))
    kind, params = raw.get("type"), raw.get("params") or {}
    if not isinstance(kind, str):
        reading.problem(f"{section}.type", f"expected a name, got {kind!r}. There are {_listed(section)}.")
        return None
    if not isinstance(params, Mapping):
        reading.problem(f"{section}.params", f"expected a section {{…}}, got {params!r}.")
        return None
    named = Named(kind, dict(params))
    reading.used.append((f"{section}.type", kind))
    if _known_type(reading, section, named):
        _check_params(reading, section, named)
    return named


def _listed(section: str) -> str:
    return ", ".join(_SPELT[section].split())


def _known_type(reading: Reading, section: str, named: Named) -> bool:
    known = (*OPTIMIZERS, *OTHER_OPTIMIZERS) if section == "optimizer" else (*SCHEDULERS, *OTHER_SCHEDULERS)
    path = f"{section}.type"
    if named.folded in known:
        return True
    if section == "optimizer" and named.folded in _COMPRESSED:
        reading.problem(
            path,
            f"{named.type} compresses communication, or needs the mup package, and is not available. Use "
            f"{_COMPRESSED[named.folded]}; communication_data_type bf16 halves what gradients send.",
        )
    else:
        spelt = {name.lower(): name for name in _SPELT[section].split()}
        near = difflib.get_close_matches(named.folded, known, n=1)
        hint = f" Did you mean {spelt.get(near[0], near[0])!r}?" if near else ""
        reading.problem(path, f"{named.type!r} is unknown.{hint} There are {_listed(section)}.")
    return False


def _check_params(reading: Reading, section: str, named: Named) -> None:
    table = OPTIMIZERS if section == "optimizer" else SCHEDULERS
    names = table[named.folded].split() if named.folded in table else None
    for name, value in named.params.items():
        path = f"{section}.params.{name}"
        if section == "optimizer" and name == "max_grad_norm":
            reading.problem(
                path, f"an optimizer does not clip here. Write gradient_clipping: {value} at the top level instead."
            )
        elif names is not None and name not in names:
            other = " Here that is lr." if name == "learning_rate" and "lr" in names else ""
            hint = other or did_you_mean(name, names) or f" It takes {', '.join(names)}."
            reading.problem(path, f"{named.type} has no such parameter.{hint}")
        elif value == AUTO:
            reading.autos[path] = ()
        else:
            reading.used.append((path, named.type))


HF_DEFAULTS: dict[str, Any] = {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
"""What "auto" is in an optimizer's params when nobody says otherwise: the defaults of Hugging Face's Trainer."""
WARMUP_STEPS = 1000
"""`warmup_num_steps` "auto": DeepSpeed's default, but a tenth of the steps at most."""


def settle_optimizer(named: Named, scheduler: Named | None) -> tuple[Named, list[tuple[str, str]]]:
    """The optimizer with every "auto" in its params filled in, and a line of the report for each."""
    params, lines = dict(named.params), []
    for name in [name for name, value in params.items() if value == AUTO]:
        path = f"optimizer.params.{name}"
        peak = scheduler.params.get("warmup_max_lr") if scheduler is not None and name == "lr" else None
        if isinstance(peak, int | float):
            params[name] = peak
            lines.append((path, f"auto: {peak:g}, the scheduler's warmup_max_lr"))
        elif name in HF_DEFAULTS:
            params[name] = HF_DEFAULTS[name]
            lines.append((path, f"auto: {_shown(params[name])}, the default of Hugging Face's Trainer"))
        else:
            del params[name]
            lines.append((path, f"auto: the default of {named.type}"))
    decoupled = params.get("adam_w_mode") or params.get("decoupled_weight_decay")
    if named.folded == "adam" and params.get("weight_decay") and not decoupled:
        lines.append(
            ("optimizer.type", "Adam is torch.optim.Adam: weight decay is added to the gradient; AdamW decouples it")
        )
    return Named(named.type, params), lines


def settle_scheduler(
    named: Named, lr: float | None, total_steps: int | None
) -> tuple[Named, list[tuple[str, str]], list[str]]:
    """The scheduler with every "auto" filled in, lines of the report, and problems as `key: text`."""
    params, lines, problems = dict(named.params), [], []
    for name in [name for name, value in params.items() if value == AUTO]:
        path = f"scheduler.params.{name}"
        if name == "warmup_max_lr" and lr is not None:
            params[name] = lr
            lines.append((path, f"auto: {lr:g}, the optimizer's lr"))
        elif name == "warmup_min_lr":
            params[name] = 0.0
            lines.append((path, "auto: 0"))
        elif name == "total_num_steps" and total_steps is not None:
            params[name] = total_steps
            lines.append((path, f"auto: {total_steps}, the steps of training"))
        elif name == "total_num_steps":
            problems.append(f"{path}: auto, and the number of steps is not known. Write it as a number.")
        elif name == "warmup_num_steps":
            steps = params.get("total_num_steps") if total_steps is None else total_steps
            tenth = max(int(steps) // 10, 1) if isinstance(steps, int | float) else WARMUP_STEPS
            params[name] = min(WARMUP_STEPS, tenth)
            what = "a tenth of the steps" if tenth < WARMUP_STEPS else "DeepSpeed's default"
            lines.append((path, f"auto: {params[name]}, {what}"))
        else:
            del params[name]
            lines.append((path, f"auto: the default of {named.type}"))
    return Named(named.type, params), lines, problems


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, list) else f"{value:g}"
