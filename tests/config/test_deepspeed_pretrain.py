"""`pretrain_gpt.py --deepspeed --deepspeed_config FILE` beside Megatron's flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import KeyReport
from megazero.config.flags import main_config, parse_run_config, parse_with_report
from megazero.config.rules import find_problems
from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from tests.config.ds_blocks import BLOCKS

COMMAND = """--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --num-layers 96 --hidden-size 12288
    --num-attention-heads 96 --seq-length 2048 --global-batch-size 1024 --train-iters 500000
    --deepspeed --deepspeed_config"""
LAUNCH = COMMAND.split()


@pytest.fixture
def ds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a ds_config.json and give the flags that read it."""
    monkeypatch.chdir(tmp_path)

    def written(tree: Any) -> list[str]:
        Path("ds_config.json").write_text(json.dumps(tree))
        return ["--deepspeed", "--deepspeed_config", "ds_config.json"]

    return written


def refusal(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_run_config(argv)
    return str(error.value)


def report_of(argv: list[str]) -> KeyReport:
    report = parse_with_report(argv)[1]
    assert report is not None
    return report


@pytest.mark.parametrize(
    "name", ["complete", "llama2_zero2", "zero_1", "zero_2", "zero_3", "bf16", "offload_optimizer"]
)
def test_the_documented_launch_command(ds: Any, name: str) -> None:
    ds(BLOCKS[name])
    argv = [*LAUNCH, "ds_config.json", "--local_rank=3", "--mock-data", "--vocab-size", "50257"]
    config = resolve(parse_run_config(argv), 32)
    assert (config.training.global_batch_size, config.training.train_iters) == (1024, 500_000)
    assert config.parallel.zero_stage == BLOCKS[name].get("zero_optimization", {}).get("stage", 1)


def test_it_stands_between_recipe_and_flags(ds: Any) -> None:
    argv = ds({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "train_batch_size": 64})
    config = parse_run_config(["--recipe", "debug_cpu.yaml", *argv, "--lr", "0.5"])
    assert (config.parallel.zero_stage, config.optimizer.clip_grad, config.optimizer.lr) == (2, 0.5, 0.5)
    assert config.training.global_batch_size == 64
    assert config.origins["training.global_batch_size"] == "ds_config.json train_batch_size"


def test_auto_means_from_the_flags(ds: Any) -> None:
    argv = ds(BLOCKS["complete"])
    config = parse_run_config([*argv, "--lr", "0.5", "--bf16", "--micro-batch-size", "3", "--weight-decay", "0.3"])
    assert (config.optimizer.lr, config.training.precision, config.training.micro_batch_size) == (0.5, "bf16", 3)
    assert (config.optimizer.weight_decay, config.optimizer.adam_eps) == (0.3, 1e-8)
    assert ("optimizer.params.lr", "auto: from the flags") in report_of(argv).translated
    assert parse_run_config(argv).training.precision == "auto"


def test_equal_values_are_no_contradiction(ds: Any) -> None:
    argv = ds({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "train_batch_size": 8})
    config = parse_run_config([*argv, "--zero-stage", "2", "--bf16", "--global-batch-size", "8"])
    assert config.origins["parallel.zero_stage"] == "flag --zero-stage"


def test_a_switch_that_is_off_leaves_the_type_to_the_flags(ds: Any) -> None:
    argv = ds({"fp16": {"enabled": False}})
    assert parse_run_config([*argv, "--bf16"]).training.precision == "bf16"
    assert parse_run_config(ds({"fp16": {"enabled": False}, "bf16": {"enabled": False}})).training.precision == "fp32"


def test_contradictions_name_both(ds: Any) -> None:
    argv = ds({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}, **BLOCKS["scheduler"]})
    with pytest.raises(ConfigError) as error:
        parse_run_config([*argv, "--zero-stage", "1", "--bf16", "--lr", "0.5", "--lr-warmup-fraction", "0.1"])
    tail = 'Make them equal, write "auto" in ds_config.json, or leave one out.'
    assert error.value.problems == (
        f"ds_config.json zero_optimization.stage means --zero-stage 2, and --zero-stage says 1. {tail}",
        f"ds_config.json fp16.enabled means --precision fp16, and --bf16 says bf16. {tail}",
        "ds_config.json scheduler.params.warmup_num_steps means --lr-warmup-iters 2000, which --lr-warmup-fraction "
        'excludes. Write "auto" in ds_config.json, or leave one out.',
        f"ds_config.json scheduler.params.warmup_max_lr means --lr 0.0003, and --lr says 0.5. {tail}",
    )


def test_batch_triple_is_checked_when_ranks_are_known(ds: Any) -> None:
    small = ["--mock-data", "--vocab-size", "512", "--train-iters", "9"]
    config = parse_run_config([*ds(BLOCKS["batch"]), *small])
    assert resolve(config, 8).training.global_batch_size == 2048
    with pytest.raises(
        ConfigError, match="train_batch_size 2048 is not train_micro_batch_size_per_gpu · gradient_accumul"
    ):
        resolve(config, 4)
    config = parse_run_config([*ds(BLOCKS["masterclass"] | {"fp16": {"enabled": False}}), *small])
    assert resolve(config, 4).training.micro_batch_size == 8
    config = parse_run_config([*ds({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8}), *small])
    assert resolve(config, 4).training.global_batch_size == 64


def test_a_precision_that_is_auto_and_not_bf16(ds: Any) -> None:
    argv = ds({"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}})
    for said, flags in (("auto", []), ("bf16", ["--bf16"])):
        text = f"ds_config.json fp16.enabled is auto and bf16.enabled false, and --precision {said} means bf16"
        assert refusal([*argv, *flags]).startswith(text)
    assert parse_run_config([*argv, "--fp16"]).training.precision == "fp16"
    assert parse_run_config([*argv, "--precision", "fp32"]).training.precision == "fp32"


def test_where_a_value_came_from_decides_how_it_is_named(ds: Any) -> None:
    """The one of the file by its key, the one of a flag by its flag, wherever they meet."""
    run = ["--mock-data", "--vocab-size", "512", "--train-iters", "9"]
    argv = ds({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(ConfigError) as error:
        resolve(parse_run_config([*argv, *run, "--zero-stage", "0"]), 1)
    assert str(error.value).startswith(
        "zero_optimization.offload_optimizer.device cpu (ds_config.json) with --zero-stage 0: "
    )
    assert str(error.value).endswith("Use --zero-stage 1, 2 or 3, or zero_optimization.offload_optimizer.device none.")
    argv = ds({"zero_optimization": {"stage": 0}})
    with pytest.raises(ConfigError) as error:
        resolve(parse_run_config([*argv, *run, "--offload-optimizer", "cpu"]), 1)
    assert str(error.value).startswith("--offload-optimizer cpu with zero_optimization.stage 0 (ds_config.json): ")
    assert str(error.value).endswith("Use zero_optimization.stage 1, 2 or 3, or --offload-optimizer none.")


def test_offloaded_weights_below_stage_3(ds: Any) -> None:
    run = ["--mock-data", "--vocab-size", "512", "--train-iters", "9"]
    argv = ds({"zero_optimization": {"offload_param": {"device": "cpu"}}})
    assert resolve(parse_run_config([*argv, *run, "--zero-stage", "2"]), 1).offload.offload_param == "none"
    path = "zero_optimization.offload_param.device"
    assert path in dict(report_of([*argv, "--zero-stage", "2"]).ignored)
    assert resolve(parse_run_config([*argv, *run, "--zero-stage", "3"]), 1).offload.offload_param == "cpu"
    with pytest.raises(ConfigError, match="--offload-param cpu with --zero-stage 2: weights can only be away"):
        resolve(parse_run_config([*run, "--zero-stage", "2", "--offload-param", "cpu"]), 1)


def test_deepspeed_takes_its_file_directly_too(ds: Any) -> None:
    ds({"zero_optimization": {"stage": 3}})
    assert parse_run_config(["--deepspeed", "ds_config.json"]).parallel.zero_stage == 3
    assert parse_run_config(["--deepspeed=ds_config.json"]).parallel.zero_stage == 3
    assert parse_run_config(["--deepspeed_config", "ds_config.json"]).parallel.zero_stage == 3
    both = ["--deepspeed", "ds_config.json", "--deepspeed_config", "ds_config.json"]
    assert parse_run_config(both).parallel.zero_stage == 3
    assert parse_with_report([])[1] is None


def test_a_missing_or_second_file_is_an_error(ds: Any) -> None:
    assert refusal(["--deepspeed", "--lr", "1"]) == (
        "--deepspeed needs its configuration. Give --deepspeed_config ds_config.json too, or leave it out: ZeRO is "
        "there anyway, as --zero-stage."
    )
    assert refusal(["--deepspeed", "a.json", "--deepspeed-config", "b.json"]) == (
        "--deepspeed a.json and --deepspeed_config b.json name two files; give one."
    )
    assert refusal(["--deepspeed-config", "b.json"]).startswith("b.json: no such file")


def test_the_report_is_printed_once(ds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*ds({"steps_per_print": 5, "prescale_gradients": True}), "--mock-data", "--vocab-size", "9"]
    main_config([*argv, "--train-iters", "3"])
    assert capsys.readouterr().out == (
        "ds_config.json: 2 keys: 1 used, 0 translated, 1 ignored\n"
        "  ignored prescale_gradients: gradients are summed in fp32 and divided once, at the step\n"
    )
    main_config([*argv, "--train-iters", "3"], quiet=True)
    assert capsys.readouterr().out == ""


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


@pytest.mark.parametrize(
    ("tree", "fields"),
    [
        (optimizer("AdamW", lr=1e-3), ("adam", True, 1e-3, 0.01, 0.9, 0.999, 1e-8)),
        (optimizer("Adam", betas=[0.8, 0.9]), ("adam", False, 3e-4, 0.0, 0.8, 0.9, 1e-8)),
        (optimizer("Adam", adam_w_mode=True), ("adam", True, 3e-4, 0.0, 0.9, 0.999, 1e-8)),
        (optimizer("FusedAdam", bias_correction=True), ("adam", True, 3e-4, 0.01, 0.9, 0.999, 1e-8)),
        (optimizer("DeepSpeedCPUAdam", adam_w_mode=False), ("adam", False, 3e-4, 0.01, 0.9, 0.999, 1e-8)),
        (optimizer("AdamW8bit"), ("adam8bit", True, 3e-4, 0.01, 0.9, 0.999, 1e-8)),
        (optimizer("Lion", weight_decay=0.5), ("lion", True, 3e-4, 0.5, 0.9, 0.99, 1e-8)),
        (optimizer("Adagrad"), ("adagrad", True, 3e-4, 0.0, 0.9, 0.95, 1e-10)),
        (optimizer("Lamb", max_coeff=10.0), ("lamb", True, 3e-4, 0.0, 0.9, 0.999, 1e-8)),
        (optimizer("Muon"), ("muon", True, 3e-4, 0.1, 0.9, 0.999, 1e-8)),
    ],
)
def test_optimizers(ds: Any, tree: dict[str, Any], fields: tuple[Any, ...]) -> None:
    made = parse_run_config(ds(tree)).optimizer
    found = (made.optimizer, made.decoupled_weight_decay, made.lr, made.weight_decay)
    assert (*found, made.adam_beta1, made.adam_beta2, made.adam_eps) == fields


def test_sgd_and_defaults_give_way_to_flags(ds: Any) -> None:
    made = parse_run_config(ds(optimizer("SGD", lr=0.1))).optimizer
    assert (made.optimizer, made.sgd_momentum, made.weight_decay) == ("sgd", 0.0, 0.0)
    argv = ds(optimizer("SGD", lr=0.1, momentum=0.5, nesterov=False))
    assert parse_run_config([*argv, "--weight-decay", "0.2"]).optimizer.weight_decay == 0.2
    assert parse_run_config(argv).optimizer.sgd_momentum == 0.5
    assert report_of(argv).assumed == (("optimizer.params.weight_decay", "0"),)


@pytest.mark.parametrize(
    ("tree", "fields"),
    [
        (scheduler("WarmupLR"), ("constant", 1000, "log", 0.0, 3e-4, None, 0.0)),
        (
            scheduler("WarmupLR", warmup_min_lr=1e-5, warmup_max_lr=1e-3, warmup_num_steps=50, warmup_type="linear"),
            ("constant", 50, "linear", 1e-5, 1e-3, None, 0.0),
        ),
        (
            scheduler("WarmupDecayLR", total_num_steps=300, warmup_max_lr=1e-3, warmup_min_lr=1e-6),
            ("linear", 1000, "log", 1e-6, 1e-3, 300, 1e-6),
        ),
        (
            optimizer("AdamW", lr=0.5)
            | scheduler("WarmupCosineLR", total_num_steps=300, warmup_min_ratio=0.1, cos_min_ratio=0.2),
            ("cosine", 1000, "log", 0.05, 0.5, 300, 0.1),
        ),
        (
            scheduler("WarmupCosineLR", total_num_steps="auto", warmup_num_steps="auto"),
            ("cosine", 0, "log", 0.0, 3e-4, None, 3e-4 * 1e-4),
        ),
    ],
)
def test_schedulers(ds: Any, tree: dict[str, Any], fields: tuple[Any, ...]) -> None:
    made = parse_run_config(ds(tree)).optimizer
    shape = (made.lr_decay_style, made.lr_warmup_iters, made.lr_warmup_style, made.lr_warmup_init, made.lr)
    assert (*shape, made.lr_decay_iters, made.min_lr) == pytest.approx(fields)


def test_the_schedulers_peak_comes_before_the_optimizers(ds: Any) -> None:
    argv = ds(optimizer("AdamW", lr=0.5) | scheduler("WarmupLR", warmup_max_lr=0.25, warmup_type="linear"))
    assert parse_run_config(argv).optimizer.lr == 0.25
    lines = report_of(argv).translated
    assert ("optimizer.params.lr", "gives way to scheduler.params.warmup_max_lr") in lines
    assert ("scheduler.type", "--lr-decay-style constant (DeepSpeed's own course runs one step behind)") in lines


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            optimizer("RMSprop"),
            "ds_config.json: optimizer.type: RMSprop is not one of pretraining's optimizers. Use AdamW, Adam, SGD, "
            "Adagrad, Lamb, Lion, Muon or AdamW8bit.",
        ),
        (
            optimizer("AdamW", amsgrad=True),
            "ds_config.json: optimizer.params.amsgrad: True has no flag of pretraining that equals it. Leave it out.",
        ),
        (
            optimizer("AdamW", betas=0.9),
            "ds_config.json: optimizer.params.betas: expected two numbers, got 0.9. Write [0.9, 0.999], for instance.",
        ),
        (
            scheduler("OneCycle"),
            "ds_config.json: scheduler.type: OneCycle has no equal among --lr-decay-style constant, linear, cosine, "
            "inverse-square-root and WSD. Remove the section and use these flags, or call megazero.initialize in a "
            "script of yours.",
        ),
        (
            scheduler("WarmupLR", last_batch_iteration=5),
            "ds_config.json: scheduler.params.last_batch_iteration: a run begins at -1, or where its checkpoint is. "
            "Use -1.",
        ),
        (
            scheduler("WarmupLR", warmup_type="cubic"),
            "ds_config.json: scheduler.params.warmup_type: expected one of linear, log, got 'cubic'.",
        ),
    ],
)
def test_what_has_no_equal_is_refused(ds: Any, tree: dict[str, Any], message: str) -> None:
    assert refusal(ds(tree)) == message


def test_keys_of_other_fronts_are_ignored_with_reasons(ds: Any) -> None:
    tree = {
        "dataloader_drop_last": True,
        "pipeline": {"seed_layers": True},
        "checkpoint": {"tag_validation": "Warn"},
        "csv_monitor": {"enabled": True},
    }
    ignored = dict(report_of(ds(tree)).ignored)
    assert set(ignored) == {
        "dataloader_drop_last",
        "pipeline.seed_layers",
        "checkpoint.tag_validation",
        "csv_monitor.enabled",
    }


@pytest.mark.parametrize(
    ("flags", "kept", "reason"),
    [
        ([], False, "there are no tensor-parallel ranks"),
        (["--tensor-model-parallel-size", "2"], False, "sequence parallelism divides them already"),
        (["--tensor-model-parallel-size", "2", "--no-sequence-parallel"], True, None),
    ],
)
def test_partitioned_activations_only_where_there_is_something_to_divide(
    ds: Any, flags: list[str], kept: bool, reason: str | None
) -> None:
    argv = [*ds(BLOCKS["activation_checkpointing"]), *flags, "--mock-data", "--vocab-size", "512"]
    config = parse_run_config([*argv, "--train-iters", "5"])
    assert config.recompute.partition_activations is kept
    assert dict(report_of(argv).ignored).get("activation_checkpointing.partition_activations") == reason
    resolved: RunConfig = resolve(config, 2)
    assert find_problems(resolved, 2) == []
