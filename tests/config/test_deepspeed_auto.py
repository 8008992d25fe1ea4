"""What is "auto" or left out, settled from model, ranks and length; optimizers and schedulers by name."""

from __future__ import annotations

from typing import Any

import pytest

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import ModelFacts, ResolvedDeepSpeed, read_deepspeed, resolve_deepspeed
from megazero.config.deepspeed_optimizers import OPTIMIZERS, OTHER_OPTIMIZERS

AUTO_SIZES = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
}


def resolved(source: dict[str, Any], ranks: int = 2, **others: Any) -> ResolvedDeepSpeed:
    return resolve_deepspeed(read_deepspeed(source), data_parallel_size=ranks, **{"model": None, **others})


def refusal(source: dict[str, Any], **others: Any) -> str:
    with pytest.raises(ConfigError) as error:
        resolved(source, **others)
    return str(error.value)


def sizes(found: ResolvedDeepSpeed) -> tuple[int | None, ...]:
    parallel = found.config.parallel
    return (
        parallel.ddp_bucket_size,
        parallel.stage3_prefetch_bucket_size,
        parallel.stage3_param_persistence_threshold,
    )


def test_bucket_sizes_follow_the_hidden_size() -> None:
    found = resolved(AUTO_SIZES, model=ModelFacts(7_000_000_000, 4096, 200_000_000))
    assert sizes(found) == (4096**2, int(0.9 * 4096**2), 40960)
    assert dict(found.report.translated)["zero_optimization.reduce_bucket_size"] == (
        "auto: 16,777,216 elements, h² with h = 4096, the hidden size"
    )
    assert found.config.origins["parallel.ddp_bucket_size"].startswith("config zero_optimization.reduce_bucket_size: ")


def test_without_a_hidden_size_the_largest_layer_decides() -> None:
    found = resolved(AUTO_SIZES, model=ModelFacts(10_000, None, 12 * 64 * 64))
    assert sizes(found) == (64 * 64, int(0.9 * 64 * 64), 640)
    assert "h = 64, the √(largest layer / 12)" in dict(found.report.translated)["zero_optimization.reduce_bucket_size"]
    assert ModelFacts(1, None, 1).width[0] == 1


def test_without_a_model_sizes_stay_derived() -> None:
    found = resolved(AUTO_SIZES)
    assert sizes(found) == (None, None, 0)
    assert set(dict(found.report.translated).values()) == {"auto: derived from the model, once it is there"}


def test_what_is_left_out_is_deepspeeds_default_and_said() -> None:
    found = resolved({})
    config = found.config
    assert (config.parallel.zero_stage, config.training.precision, config.optimizer.clip_grad) == (0, "fp32", 1.0)
    assert found.report.assumed == (
        ("zero_optimization.stage", "0"),
        ("fp16 and bf16", "off"),
        ("gradient_clipping", "1.0"),
        ("train_batch_size", "2"),
        ("train_micro_batch_size_per_gpu", "1"),
        ("gradient_accumulation_steps", "1"),
    )
    assert (found.optimizer, found.scheduler, found.gradient_accumulation_steps) == (None, None, 1)


def test_clipping_may_be_off_or_auto() -> None:
    assert resolved({"gradient_clipping": 0.0}).config.optimizer.clip_grad == 0.0
    found = resolved({"gradient_clipping": "auto"})
    assert found.config.optimizer.clip_grad == 1.0
    assert ("gradient_clipping", "auto: 1.0") in found.report.translated


@pytest.mark.parametrize(
    ("source", "precision"),
    [
        ({"fp16": {"enabled": "auto"}}, "auto"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, "auto"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, "fp32"),
        ({"torch_autocast": {"enabled": True}, "bf16": {"enabled": "auto"}}, "fp32"),
    ],
)
def test_precision(source: dict[str, Any], precision: str) -> None:
    assert resolved(source).config.training.precision == precision


@pytest.mark.parametrize(
    ("bf16", "on_gpu"), [({"bf16": {"enabled": False}}, "fp16"), ({"bf16": {"enabled": "auto"}}, "bf16"), ({}, "bf16")]
)
def test_auto_respects_a_no_to_bf16(bf16: dict[str, Any], on_gpu: str) -> None:
    found = resolved({"fp16": {"enabled": "auto"}} | bf16)
    assert (found.config.training.precision, found.options.auto_precision) == ("auto", on_gpu)
    assert dict(found.report.translated)["fp16.enabled"] == f"auto: {on_gpu} on a GPU, fp32 on a CPU"


def test_batch_auto_is_completed() -> None:
    found = resolved({"train_batch_size": 12, "gradient_accumulation_steps": "auto"}, ranks=3)
    assert found.config.training.micro_batch_size == 4
    assert ("gradient_accumulation_steps", "auto: batch 12 = micro-batch 4 · accumulation 1 · 3 ranks") in (
        found.report.translated
    )
    assert ("train_micro_batch_size_per_gpu", "4") in found.report.assumed


def test_any_other_auto_is_the_default() -> None:
    found = resolved({"fp16": {"enabled": True, "hysteresis": "auto"}, "aio": {"queue_depth": "auto"}})
    assert (found.config.loss_scaling.hysteresis, found.config.offload.nvme_queue_depth) == (2, 8)
    assert ("fp16.hysteresis", "auto: 2") in found.report.translated
    nvme = resolved({"data_types": {"grad_accum_dtype": "auto"}, "communication_data_type": "auto"})
    assert nvme.config.parallel.grad_accum_dtype == "fp32"
    path = resolved({"zero_optimization": {"offload_param": {"nvme_path": "auto"}}})
    assert ("zero_optimization.offload_param.nvme_path", "auto: derived") in path.report.translated


def test_impossible_settings_name_the_keys_that_they_come_from() -> None:
    text = refusal({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "train_batch_size": 3})
    assert "config: train_batch_size 3 on 2 data-parallel ranks" in text
    assert "zero_optimization.offload_optimizer.device cpu (config) with zero_optimization.stage 0 (config)" in text


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


@pytest.mark.parametrize(
    ("source", "named", "remedy"),
    [
        (
            zero(0, cpu_offload=True),
            "zero_optimization.cpu_offload true (config) with zero_optimization.stage 0 (config):",
            "Use zero_optimization.stage 1, 2 or 3, or zero_optimization.offload_optimizer.device none.",
        ),
        (
            zero(3, offload_optimizer={"device": "nvme"}),
            "zero_optimization.offload_optimizer.device nvme (config) needs",
            "Give zero_optimization.offload_optimizer.nvme_path FOLDER, or use "
            "zero_optimization.offload_optimizer.device cpu.",
        ),
        (
            {"torch_autocast": {"enabled": True}, "bfloat16": {"enabled": True}},
            "torch_autocast.enabled true (config) with bf16.enabled true (config):",
            "Use fp16.enabled and bf16.enabled false, or torch_autocast.enabled false.",
        ),
        (
            {"fp16": {"enabled": True, "initial_scale_power": -3}},
            "fp16.initial_scale_power -3 (config) is below fp16.min_loss_scale 1.0 (default):",
            "Use fp16.min_loss_scale 0.125 or less.",
        ),
        ({"sequence_parallel_size": 2}, "config: sequence_parallel_size:", "remove it; pretrain_gpt.py has it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problems_and_remedies_are_keys_of_the_file(source: dict[str, Any], named: str, remedy: str) -> None:
    text = refusal(source)
    assert text.startswith(named)
    assert remedy in text
    assert "sequence" in named or "--" not in text


@pytest.mark.parametrize("keys", [{"offload_param": {"device": "nvme"}}, {"cpu_offload_params": True}])
def test_offloaded_weights_have_no_effect_below_stage_3(keys: dict[str, Any]) -> None:
    found = resolved(zero(2, **keys))
    assert found.config.offload.offload_param == "none"
    why = "no effect at stage 2: only stage 3 has weights that can be away between uses"
    ((path, reason),) = found.report.ignored
    assert path in ("zero_optimization.offload_param.device", "zero_optimization.cpu_offload_params")
    assert reason == why and path not in dict(found.report.used)
    assert resolved(zero(3, offload_param={"device": "cpu"})).config.offload.offload_param == "cpu"


# Optimizers and schedulers


def optimizer(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": params.pop("kind", "AdamW"), "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def test_optimizer_autos_are_the_trainers_defaults() -> None:
    found = resolved(optimizer(lr="auto", betas="auto", eps="auto", weight_decay="auto", amsgrad="auto"))
    assert found.optimizer is not None
    assert found.optimizer.params == {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    lines = dict(found.report.translated)
    assert lines["optimizer.params.lr"] == "auto: 5e-05, the default of Hugging Face's Trainer"
    assert lines["optimizer.params.amsgrad"] == "auto: the default of AdamW"


def test_learning_rates_of_optimizer_and_scheduler_fill_each_other() -> None:
    found = resolved(optimizer(lr="auto") | scheduler("WarmupLR", warmup_max_lr=0.25))
    assert found.optimizer is not None and found.optimizer.params == {"lr": 0.25}
    found = resolved(optimizer(lr=0.5) | scheduler("WarmupLR", warmup_max_lr="auto", warmup_min_lr="auto"))
    assert found.scheduler is not None
    assert found.scheduler.params == {"warmup_max_lr": 0.5, "warmup_min_lr": 0.0}


@pytest.mark.parametrize(
    ("total", "params", "steps"),
    [(None, {}, 1000), (500, {}, 50), (100_000, {}, 1000), (5, {}, 1), (None, {"total_num_steps": 300}, 30)],
)
def test_warmup_is_a_tenth_of_the_steps_but_1000_at_most(total: int | None, params: dict[str, Any], steps: int) -> None:
    source = scheduler("WarmupDecayLR", warmup_num_steps="auto", **({"total_num_steps": 9} | params))
    if total is not None or not params:
        source["scheduler"]["params"]["total_num_steps"] = "auto" if total else 100_000
    found = resolved(source, total_steps=total)
    assert found.scheduler is not None
    assert found.scheduler.params["warmup_num_steps"] == steps


def test_other_scheduler_autos_are_their_defaults() -> None:
    found = resolved(scheduler("WarmupLR", warmup_type="auto"))
    assert found.scheduler is not None and found.scheduler.params == {}
    assert ("scheduler.params.warmup_type", "auto: the default of WarmupLR") in found.report.translated


def test_total_steps_that_nobody_knows_are_an_error() -> None:
    assert refusal(scheduler("WarmupDecayLR", total_num_steps="auto")) == (
        "config: scheduler.params.total_num_steps: auto, and the number of steps is not known. Write it as a number."
    )


def test_adam_with_weight_decay_is_explained() -> None:
    text = "Adam is torch.optim.Adam: weight decay is added to the gradient; AdamW decouples it"
    assert ("optimizer.type", text) in resolved(optimizer(kind="Adam", weight_decay=0.1)).report.translated
    for source in (
        optimizer(kind="Adam", weight_decay=0.1, adam_w_mode=True),
        optimizer(kind="Adam"),
        optimizer(weight_decay=0.1),
    ):
        assert "optimizer.type" not in dict(resolved(source).report.translated)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (optimizer(lrr=1), "config: optimizer.params.lrr: AdamW has no such parameter. Did you mean 'lr'?"),
        (optimizer(kind="Lion", qqq=1),
         "config: optimizer.params.qqq: Lion has no such parameter. It takes lr, betas, weight_decay."),
        (optimizer(max_grad_norm=2.0),
         "config: optimizer.params.max_grad_norm: an optimizer does not clip here. "
         "Write gradient_clipping: 2.0 at the top level instead."),
        (optimizer(kind="Adamm"),
         "config: optimizer.type: 'Adamm' is unknown. Did you mean 'Adam'? There are Adam, AdamW, "
         "FusedAdam, CPUAdam, Adagrad, Lamb, Lion, SGD, Muon, Adam8bit, AdamW8bit."),
        (optimizer(kind="OneBitAdam"),
         "config: optimizer.type: OneBitAdam compresses communication, or needs the mup package, and is not available. "
         "Use AdamW; communication_data_type bf16 halves what gradients send."),
        (scheduler("WarmupLRR"), "config: scheduler.type: 'WarmupLRR' is unknown. Did you mean 'WarmupLR'? There are "
         "LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR."),
        (scheduler("WarmupLR", warmup_steps=1),
         "config: scheduler.params.warmup_steps: WarmupLR has no such parameter. Did you mean 'warmup_num_steps'?"),
        ({"optimizer": {"params": {}}},
         "config: optimizer.type: expected a name, got None. There are Adam, AdamW, FusedAdam, CPUAdam, Adagrad, Lamb, "
         "Lion, SGD, Muon, Adam8bit, AdamW8bit."),
        ({"optimizer": {"type": "Adam", "params": 3}}, "config: optimizer.params: expected a section {…}, got 3."),
        ({"optimizer": {"type": "Adam", "param": {}}}, "config: optimizer.param: unknown key. Did you mean 'params'?"),
        ({"optimizer": {"type": "Adam", "lr": 1}},
         "config: optimizer.lr: unknown key. Parameters stand under params."),
    ],
)  # fmt: skip
def test_names_are_checked_without_torch(source: dict[str, Any], message: str) -> None:
    assert refusal(source) == message


def test_every_known_type_is_read_in_any_case() -> None:
    for kind in (*OPTIMIZERS, *OTHER_OPTIMIZERS, "ADAMW", "adam_w"):
        ds = read_deepspeed(optimizer(kind=kind, lr=1.0))
        assert ds.optimizer is not None and ds.optimizer.type == kind
    ds = read_deepspeed({"optimizer": {"type": "RMSprop", "params": {"alpha": 0.9}, "legacy_fusion": False}})
    assert dict(ds.report.ignored)["optimizer.legacy_fusion"]
    assert read_deepspeed(scheduler("CosineAnnealingLR", T_max=3)).scheduler is not None
    assert read_deepspeed({"optimizer": None}).optimizer is None


def test_parameter_names_are_those_of_the_classes() -> None:
    from megazero.engine import optimizers
    from megazero.engine.optimizers.make import accepted_arguments

    for name in ("Adam", "AdamW", "FusedAdam", "CPUAdam", "Adagrad", "Lamb", "Lion", "SGD", "Muon"):
        assert set(accepted_arguments(getattr(optimizers, name))) <= set(OPTIMIZERS[name.lower()].split()), name
