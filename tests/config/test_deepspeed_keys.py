"""The table of keys: each of them, with a value that it takes and one that it refuses."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import DeepSpeedConfig, KeyReport, read_deepspeed
from megazero.config.deepspeed_keys import ALIASES, TABLE, Closed, Dead, Off, To, Value
from megazero.config.fields import FIELDS


def tree(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for a.b."""
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def read(path: str, value: Any) -> DeepSpeedConfig:
    return read_deepspeed(tree(path, value))


def refusal(source: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read_deepspeed(source)
    return str(error.value)


def told(report: KeyReport) -> list[str]:
    return [key for key, _ in (*report.used, *report.translated, *report.ignored)]


def of_kind(kind: type) -> list[str]:
    return [path for path, entry in TABLE.items() if isinstance(entry, kind)]


def fitting(kind: Any) -> Any:
    """A value of a field's type that every range has."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[0]
    kinds = [arm for arm in typing.get_args(kind) if arm is not type(None)] or [kind]
    return {int: 1, float: 1.0, bool: True, str: "text"}[kinds[0]]


@pytest.mark.parametrize("path", of_kind(To))
def test_a_setting_is_set_left_open_or_left_out(path: str) -> None:
    entry = TABLE[path]
    assert isinstance(entry, To)
    assert set(entry.keys) <= set(FIELDS)
    value = fitting(entry.kind or FIELDS[entry.keys[0]].kind)
    ds = read(path, value)
    assert set(entry.keys) == set(ds.settings)
    assert {setting.origin for setting in ds.settings.values()} == {f"config {path}"}
    assert told(ds.report) == [path]
    assert read(path, "auto").autos == {path: entry.keys}
    assert read(path, "auto").settings == read(path, None).settings == {}
    assert told(read(path, None).report) == [path]
    assert refusal(tree(path, {"a": 1})).startswith(f"config: {path}: expected ")


@pytest.mark.parametrize("path", of_kind(Dead))
def test_a_dead_key_is_ignored_with_its_reason(path: str) -> None:
    entry = TABLE[path]
    assert isinstance(entry, Dead)
    for value in (True, "auto", None):
        assert read(path, value).report.ignored == ((path, entry.reason),)
    assert read(path, 1).settings == {}


@pytest.mark.parametrize("path", of_kind(Off))
def test_a_feature_that_is_not_here_may_be_off(path: str) -> None:
    entry = TABLE[path]
    assert isinstance(entry, Off)
    for value in entry.values:
        assert read(path, value).report.ignored == ((path, "is off"),)
    assert read(path, None).report.ignored == ((path, "is not given"),)
    assert f"config: {path}: 'a' is not available" in refusal(tree(path, "a"))
    assert refusal(tree(path, "a")).endswith(f"; {entry.remedy}.")


@pytest.mark.parametrize("path", of_kind(Closed))
def test_a_section_that_is_not_here_may_be_off(path: str) -> None:
    entry = TABLE[path]
    assert isinstance(entry, Closed)
    off: list[Any] = [None, {}, False, "auto"] + [{name: no} for name in entry.switches for no in (False, "auto", None)]
    for value in off:
        assert read(path, value).report.ignored == ((path, "is off"),)
    for on in [tree(path, {name: True}) for name in entry.switches or ("a",)]:
        _closed_is_on(path, entry, on)


def _closed_is_on(path: str, entry: Closed, on: dict[str, Any]) -> None:
    if entry.harmless:
        assert read_deepspeed(on).report.ignored == ((path, entry.remedy),)
    else:
        assert refusal(on) == f"config: {path}: is not available; {entry.remedy}."


@pytest.mark.parametrize("path", of_kind(Value))
def test_a_value_is_told_of(path: str) -> None:
    entry = TABLE[path]
    assert isinstance(entry, Value)
    value = 4 if entry.kind is float else fitting(entry.kind)
    ds = read(path, value) if path != "data_types.grad_accum_dtype" else read(path, "fp32")
    assert told(ds.report) == [path] or path == "torch_autocast.dtype"
    assert read(path, None).report.used == ((path, "left out"),)
    assert read(path, "auto") is not None
    assert refusal(tree(path, {"a": 1})).startswith(f"config: {path}: expected ")


def test_aliases_lead_into_the_table() -> None:
    for old, new in ALIASES.items():
        assert old not in TABLE
        assert new in TABLE or any(path.startswith(f"{new}.") for path in TABLE)


@pytest.mark.parametrize(
    ("source", "key", "value"),
    [
        ({"bfloat16": {"enabled": True}}, "training.precision", "bf16"),
        ({"zero_optimization": {"aio": {"queue_depth": 3}}}, "offload.nvme_queue_depth", 3),
        ({"aio": {"queue_depth": 3}}, "offload.nvme_queue_depth", 3),
        ({"aio": {"thread_count": 3}}, "offload.nvme_threads", 3),
        ({"zero_optimization": {"aio": {"thread_count": 3}}}, "offload.nvme_threads", 3),
        ({"aio": {"intra_op_parallelism": 3}}, "offload.nvme_threads", 3),
        ({"tensor_parallel": {"tp_size": 3}}, "parallel.tensor_model_parallel_size", 3),
        ({"tensor_parallel": {"tp": {"tp_size": 3}}}, "parallel.tensor_model_parallel_size", 3),
        ({"tensor_parallel": {"autotp_size": 3}}, "parallel.tensor_model_parallel_size", 3),
        ({"tensor_parallel": {"autotp_size": 0}}, "parallel.tensor_model_parallel_size", 1),
        ({"tensor_parallel": {"enabled": False, "tp_size": 3}}, "parallel.tensor_model_parallel_size", 1),
        ({"zero_optimization": {"max_reuse_distance": 2e3}}, "parallel.stage3_max_reuse_distance", 2000),
        ({"zero_optimization": {"reduce_bucket_size": 5e8}}, "parallel.ddp_bucket_size", 500_000_000),
        ({"zero_optimization": True}, "parallel.zero_stage", 1),
        ({"zero_optimization": False}, "parallel.zero_stage", 0),
        ({"zero_optimization": {"cpu_offload": True}}, "offload.offload_optimizer", "cpu"),
        ({"zero_optimization": {"cpu_offload": False}}, "offload.offload_optimizer", "none"),
        ({"zero_optimization": {"cpu_offload_params": True}}, "offload.offload_param", "cpu"),
        ({"zero_optimization": {"cpu_offload_use_pin_memory": False}}, "offload.offload_pin_memory", False),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": "auto"}}, "training.precision", "fp16"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "training.precision", "fp32"),
        ({"fp16": {"initial_scale_power": 12}}, "loss_scaling.initial_loss_scale", 4096.0),
        ({"fp16": {"min_loss_scale": 1e-8}}, "loss_scaling.min_loss_scale", 1e-8),
        ({"fp16": {"auto_cast": True}}, "training.autocast_inputs", True),
        ({"bf16": {"check_grad_overflow": False}}, "training.non_finite", "ignore"),
        ({"bf16": {"check_grad_overflow": True}}, "training.non_finite", "skip"),
        ({"torch_autocast": {"enabled": True}}, "training.autocast", "bf16"),
        ({"torch_autocast": {"enabled": True}}, "training.precision", "fp32"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "training.autocast", "fp16"),
        ({"torch_autocast": {"enabled": False, "dtype": "float16"}}, "training.autocast", "none"),
        ({"communication_data_type": "bfp16"}, "parallel.grad_reduce_in_bf16", True),
        ({"communication_data_type": "fp32"}, "parallel.grad_reduce_in_bf16", False),
        ({"communication_data_type": "fp16"}, "parallel.grad_reduce_in_bf16", False),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "parallel.grad_accum_dtype", "fp32"),
        (
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
            "parallel.grad_accum_dtype",
            "model",
        ),
        ({"moe_expert_parallel_size": 2}, "parallel.expert_model_parallel_size", 2),
        ({"moe": {"enabled": True, "ep_size": 2}}, "parallel.expert_model_parallel_size", 2),
        ({"moe": {"enabled": False, "ep_size": 2}}, "parallel.expert_model_parallel_size", 1),
        ({"pipeline": {"activation_checkpoint_interval": 2}}, "recompute.recompute_num_layers", 2),
        ({"tensorboard": {"enabled": True}}, "logging.tensorboard_dir", "runs/megazero"),
        (
            {"tensorboard": {"enabled": True, "output_path": "a", "job_name": "b"}},
            "logging.tensorboard_dir",
            "a/b",
        ),
        ({"wandb": {"enabled": True, "project": "p"}}, "logging.wandb_project", "p"),
        ({"steps_per_print": 7.0}, "logging.log_interval", 7),
    ],
)
def test_other_spellings_and_values_that_are_translated(source: dict[str, Any], key: str, value: Any) -> None:
    assert read_deepspeed(source).settings[key].value == value


def test_options_that_are_no_settings() -> None:
    assert read_deepspeed({"dataloader_drop_last": True}).options.dataloader_drop_last
    options = read_deepspeed({}).options
    assert (options.dataloader_drop_last, options.steps_per_print) == (False, None)
    assert (options.seed_layers, options.activation_checkpoint_interval) == (None, None)
    assert [read_deepspeed({"steps_per_print": n}).options.steps_per_print for n in (5, 0, float("inf"), "auto")] == [
        5,
        None,
        None,
        10,
    ]
    interval = read_deepspeed({"pipeline": {"activation_checkpoint_interval": 0}})
    assert (interval.options.activation_checkpoint_interval, interval.settings) == (0, {})


def test_monitors() -> None:
    ds = read_deepspeed(
        {
            "tensorboard": {"enabled": False, "output_path": "a"},
            "csv_monitor": {"enabled": True, "output_path": "logs", "job_name": "auto"},
            "wandb": {"enabled": True, "team": "t", "group": "g"},
        }
    )
    assert ds.monitors == {
        "csv_monitor": {"output_path": "logs", "job_name": "megazero"},
        "wandb": {"project": "megazero"},
    }
    assert dict(ds.report.ignored)["wandb.team"] == "set WANDB_ENTITY, which wandb reads itself"
    assert dict(ds.report.used)["tensorboard.output_path"] == "is off"


def test_pinned_memory_is_one_setting() -> None:
    both = {"offload_optimizer": {"pin_memory": True}, "offload_param": {"pin_memory": False}}
    ds = read_deepspeed({"zero_optimization": both})
    assert ds.settings["offload.offload_pin_memory"].value is False
    assert {text for _, text in ds.report.translated} == {"one setting pins all: off, as one section says"}
    assert read_deepspeed({"zero_optimization": {"offload_param": {"pin_memory": "auto"}}}).autos


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"train_batch_sise": 3}, "config: train_batch_sise: unknown key. Did you mean 'train_batch_size'?"),
        ({"grandient_accumulation_steps": 3},
         "config: grandient_accumulation_steps: unknown key. Did you mean 'gradient_accumulation_steps'?"),
        ({"zero_optimization": {"stag": 3}}, "config: zero_optimization.stag: unknown key. Did you mean 'stage'?"),
        ({"zero_optimisation": {"stage": 3}},
         "config: zero_optimisation: unknown key. Did you mean 'zero_optimization'?"),
        ({"stage": 3}, "config: stage: unknown key. It belongs in zero_optimization."),
        ({"fp16": {"train_batch_size": 3}}, "config: fp16.train_batch_size: unknown key. It belongs in the top level."),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}},
         "config: zero_optimization.offload_param.devise: unknown key. Did you mean 'device'?"),
        ({"zero_optimization": {"aio": {"queue_dept": 1}}},
         "config: zero_optimization.aio.queue_dept: unknown key. Did you mean 'queue_depth'?"),
        ({"qqqqq": 1}, "config: qqqqq: unknown key. Remove it."),
        ({"zero_optimization": 2}, "config: zero_optimization: expected a section {…}, got 2."),
        ({"zero_optimization": {"stage": 4}}, "config: zero_optimization.stage: expected one of 0, 1, 2, 3, got 4."),
        ({"zero_optimization": {"stage": True}},
         "config: zero_optimization.stage: expected one of 0, 1, 2, 3, got True."),
        ({"train_batch_size": 2.5}, "config: train_batch_size: expected a whole number, got 2.5."),
        ({"train_batch_size": 0},
         "config: train_batch_size: 0 is out of range: it must be at least 1. Use 1 or more."),
        ({"fp16": {"initial_scale_power": "x"}},
         "config: fp16.initial_scale_power: expected a finite number, got 'x'."),
        ({"fp16": {"initial_scale_power": 1e5}},
         "config: fp16.initial_scale_power: 100000.0 is too large. Use 16, for instance."),
        ({"bf16": {"check_grad_overflow": 2}}, "config: bf16.check_grad_overflow: expected true or false, got 2."),
        ({"fp16": {"min_loss_scale": 0}},
         "config: fp16.min_loss_scale: 0 is out of range: it must be above 0. Use 1, for instance."),
        ({"fp16": {"enabled": 1}}, "config: fp16.enabled: expected true or false, got 1."),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}},
         "config: fp16.enabled: true, and bf16.enabled too: weights have one type. Set one to false."),
        ({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "nvme"}}},
         "config: zero_optimization.cpu_offload: stands beside offload_optimizer, its newer form. Remove cpu_offload."),
        ({"aio": {"queue_depth": 3, "thread_count": 1, "intra_op_parallelism": 2}},
         "config: aio.intra_op_parallelism: 2 contradicts aio.thread_count: 1, which means the same. Give one."),
        ({"moe_expert_parallel_size": 2, "moe": {"ep_size": 4}},
         "config: moe.ep_size: 4 contradicts moe_expert_parallel_size: 2. Make them equal."),
        ({"data_types": {"grad_accum_dtype": "bf16"}, "fp16": {"enabled": True}},
         "config: data_types.grad_accum_dtype: bf16, but weights are fp16: gradients are kept in fp32 or in the "
         "weights' type. Use fp32."),
        ({"data_types": {"grad_accum_dtype": "bf16"}},
         "config: data_types.grad_accum_dtype: bf16, but weights are of a type that is not said: gradients are kept in "
         "fp32 or in the weights' type. Use fp32."),
        ({"pipeline": {"activation_checkpoint_interval": -1}},
         "config: pipeline.activation_checkpoint_interval: -1 is out of range: it must be at least 0. "
         "Use 0 to recompute nothing."),
        ({"steps_per_print": 2.5},
         "config: steps_per_print: expected a whole number, got 2.5. Use 10, for instance, or 0 for no lines."),
        ({"tensor_parallel": {"mpu": 3}},
         "config: tensor_parallel.mpu: 3 is not available; give it to initialize(mpu=...)."),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}},
         "config: zero_optimization.zero_hpz_partition_size: 8 is not available (only 1); remove it."),
        ({"optimizer": 3}, "config: optimizer: expected a section with type and params, got 3."),
    ],
)  # fmt: skip
def test_refuses_in_one_line(source: dict[str, Any], message: str) -> None:
    assert refusal(source) == message


def test_same_value_under_two_spellings_is_fine() -> None:
    ds = read_deepspeed({"aio": {"thread_count": 2, "intra_op_parallelism": 2}})
    assert ds.settings["offload.nvme_threads"].value == 2


def test_all_problems_come_at_once() -> None:
    source = {"stag": 1, "train_batch_size": "x", "fp16": {"enabeld": True}, "optimizer": {"type": "Adamm"}}
    with pytest.raises(ConfigError) as error:
        read_deepspeed(source)
    assert [problem.split(": ")[1] for problem in error.value.problems] == [
        "stag",
        "train_batch_size",
        "fp16.enabeld",
        "optimizer.type",
    ]


def test_the_report_is_short_and_says_all() -> None:
    report = KeyReport(
        "ds_config.json",
        used=(("train_batch_size", "x"),),
        translated=(("optimizer.params.lr", "auto: 1"), ("optimizer.params.eps", "auto: 1"), ("a", "auto: 1")),
        ignored=(("zero_optimization.b", "dead"),),
        assumed=(("gradient_clipping", "1.0"), ("c", "d")),
    )
    assert report.text() == (
        "ds_config.json: 5 keys: 1 used, 3 translated, 1 ignored\n"
        "  translated optimizer.params.lr, eps, a: auto: 1\n"
        "  ignored zero_optimization.b: dead\n"
        "  not said gradient_clipping 1.0; c d"
    )
    moved = report.with_ignored([("train_batch_size", "why")]).with_translated([("a", "other")])
    assert moved.text().startswith("ds_config.json: 5 keys: 0 used, 3 translated, 2 ignored\n")
    assert KeyReport(used=(("a", "b"),)).text() == "config: 1 key: 1 used, 0 translated, 0 ignored"
