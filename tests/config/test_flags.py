"""The command line: every field is a flag, precedence, Megatron's spellings, refusals, --help, --print-config."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megazero.base.errors import ConfigError
from megazero.config.fields import FIELDS, SECTIONS, value_of
from megazero.config.flags import build_parser, main_config, parse_run_config
from megazero.config.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_run_config(argv)
    return str(error.value)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--num-layers", "3"], "model.num_layers", 3),
        (["--num_layers", "3"], "model.num_layers", 3),
        (["--num_layers=3"], "model.num_layers", 3),
        (["--lr=3e-4"], "optimizer.lr", 3e-4),
        (["--override-opt_param-scheduler"], "checkpoint.override_opt_param_scheduler", True),
        (["--mock-data"], "data.mock_data", True),
        (["--no-overlap_grad_reduce"], "parallel.overlap_grad_reduce", False),
        (["--data-path", "0.7", "a_b", "0.3", "c"], "data.data_path", ("0.7", "a_b", "0.3", "c")),
        (["--data-path=a b"], "data.data_path", ("a b",)),
        (["--sample-prompt=--x_y=1"], "training.sample_prompt", "--x_y=1"),
        (["--sample-prompt", "- an_item"], "training.sample_prompt", "- an_item"),
        (["--zero-stage", "0"], "parallel.zero_stage", 0),
        (["--seed", "1", "--seed", "2"], "training.seed", 2),
        (["--zero-stage", "3"], "parallel.zero_stage", 3),
        (["--bf16"], "training.precision", "bf16"),
        (["--fp16"], "training.precision", "fp16"),
        (["--loss-scale", "1024"], "loss_scaling.loss_scale", 1024.0),
        (["--initial-loss-scale", "4096"], "loss_scaling.initial_loss_scale", 4096.0),
        (["--min-loss-scale", "1e-8"], "loss_scaling.min_loss_scale", 1e-8),
        (["--loss-scale-window", "500"], "loss_scaling.loss_scale_window", 500),
        (["--hysteresis", "1"], "loss_scaling.hysteresis", 1),
        (["--optimizer-cpu-offload"], "offload.offload_optimizer", "cpu"),
        (["--cpu-optimizer"], "offload.offload_optimizer", "cpu"),
        (["--accumulate-allreduce-grads-in-fp32"], "parallel.grad_accum_dtype", "fp32"),
        (["--deepspeed-activation-checkpointing"], "recompute.recompute_granularity", "full"),
        (["--gradient_accumulation_steps", "4"], "training.gradient_accumulation_steps", 4),
        (["--squared-relu"], "model.activation", "squared_relu"),
        (["--swiglu"], "model.activation", "swiglu"),
        (["--disable-bias-linear", "--preset", "gpt2"], "model.add_bias_linear", False),
    ],
)
def test_a_flag_sets_its_field_and_is_its_origin(argv: list[str], key: str, value: object) -> None:
    config = parse_run_config(argv)
    assert value_of(config, key) == value
    assert config.origins[key] == "flag " + argv[0].partition("=")[0].replace("_", "-")


def test_every_field_has_a_flag_and_without_flags_all_is_default() -> None:
    flags = build_parser().format_help()
    assert [field.flag for field in FIELDS.values() if f"  {field.flag}" not in flags] == []
    config = parse_run_config([])
    assert all(value_of(config, key) == field.default for key, field in FIELDS.items())
    assert set(config.origins.values()) == {"default"}


def test_precedence_default_preset_base_recipe_flag(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {preset: gpt2, num_layers: 1, hidden_size: 100, vocab_size: 7}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\nmodel: {num_layers: 2, hidden_size: 200}\n")
    config = parse_run_config(["--recipe", str(tmp_path / "child.yaml"), "--num-layers", "3"])
    model, origins = config.model, config.origins
    assert (model.num_layers, origins["model.num_layers"]) == (3, "flag --num-layers")
    assert (model.hidden_size, origins["model.hidden_size"]) == (200, (tmp_path / "child.yaml").as_posix())
    assert (model.vocab_size, origins["model.vocab_size"]) == (7, (tmp_path / "base.yaml").as_posix())
    assert (model.normalization, origins["model.normalization"]) == ("LayerNorm", "preset gpt2")
    assert (model.rotary_base, origins["model.rotary_base"]) == (10000.0, "default")


def test_data_path_overrides_a_recipes_mock_data_and_the_reverse(tmp_path: Path) -> None:
    config = parse_run_config(["--recipe", "debug_cpu.yaml", "--data-path", "a"])
    assert (config.data.data_path, config.data.mock_data) == (("a",), False)
    assert config.origins["data.mock_data"] == "flag --data-path"
    (tmp_path / "r.yaml").write_text("data: {data_path: [a]}\n")
    config = parse_run_config(["--recipe", str(tmp_path / "r.yaml"), "--mock-data"])
    assert (config.data.data_path, config.data.mock_data) == ((), True)


def test_train_samples_replace_a_recipes_train_iters() -> None:
    config = parse_run_config(["--recipe", "debug_cpu.yaml", "--train-samples", "640"])
    assert (config.training.train_samples, config.training.train_iters) == (640, None)


@pytest.mark.parametrize(
    ("argv", "groups", "origin"),
    [
        ([], None, "default"),
        (["--group-query-attention"], 1, "flag --group-query-attention"),
        (["--group-query-attention", "--num-query-groups", "4"], 4, "flag --num-query-groups"),
        (["--num-query-groups", "4"], 4, "flag --num-query-groups"),
        (["--group-query-attention", "--preset", "llama3-8b"], 8, "preset llama3-8b"),
        (["--group-query-attention", "--recipe", "debug_cpu.yaml"], 4, "recipes/debug_cpu.yaml"),
    ],
)
def test_group_query_attention_is_one_group_unless_said_otherwise(
    argv: list[str], groups: int | None, origin: str
) -> None:
    config = parse_run_config(argv)
    assert (config.model.num_query_groups, config.origins["model.num_query_groups"]) == (groups, origin)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-layer", "3"], "unknown flag --num-layer. Did you mean '--num-layers'?"),
        (["--tensor-model", "3"], "unknown flag --tensor-model. Did you mean '--tensor-model-parallel-size'?"),
        (["-lr", "3"], "unknown flag -lr. Did you mean '--lr'?"),
        (["--recpe", "a"], "unknown flag --recpe. Did you mean '--recipe'?"),
        (["--qqqq=1"], "unknown flag --qqqq. --help lists every flag."),
        (["--log-intervall", "1"], "unknown flag --log-intervall. Did you mean '--log-interval'?"),
        (["--no-mock-dat"], "unknown flag --no-mock-dat. Did you mean '--no-mock-data'?"),
        (["--batch_size=4"], "--batch-size: renamed to --micro-batch-size."),
        (["--lr"], "--lr: expected one argument (--help lists every flag)."),
        (["--data-path"], "--data-path: expected at least one argument (--help lists every flag)."),
        (["--lr", "fast"], "--lr: expected a finite number, got 'fast'."),
        (["--num_layers", "1e3"], "--num-layers: expected a whole number, got '1e3'; write 1000."),
        (["--zero-stage", "4"], "--zero-stage: expected one of 0, 1, 2, 3, got '4'."),
        (
            ["--lr-decay-style", "wsd"],
            "--lr-decay-style: expected one of constant, linear, cosine, inverse-square-root, ",
        ),
        (["--mock-data=true"], "--mock-data=true: this flag takes no value; write --mock-data or --no-mock-data."),
        (["--bf16=1"], "--bf16=1: this flag takes no value; write --bf16."),
        (["--mock-data", "true"], "'true' follows no flag that takes it; write --flag VALUE."),
        (["--swiglu", "--squared-relu"], "--swiglu and --squared-relu contradict each other; give one."),
        (["--bf16", "--precision", "fp32"], "--bf16 and --precision contradict each other; give one."),
        (["--mock-data", "--no-mock-data"], "--mock-data and --no-mock-data contradict each other; give one."),
        (["--recipe", "a", "--recipe", "b"], "--recipe is given twice; give one, which may name another as its base:."),
        (["--recipe", "nowhere.yaml"], "--recipe nowhere.yaml: no such file (looked at nowhere.yaml and recipes/"),
    ],
)
def test_refuses_in_one_line(argv: list[str], message: str) -> None:
    assert refusal(*argv).startswith(message)
    assert "\n" not in refusal(*argv)


def test_spellings_that_agree_are_accepted() -> None:
    assert parse_run_config(["--bf16", "--precision", "bf16"]).training.precision == "bf16"


def test_all_bad_flags_are_reported_at_once() -> None:
    assert refusal("--batch-size", "4", "--foo").startswith(
        "2 problems in the configuration:\n  - --batch-size: renamed"
    )
    assert refusal("--lr", "x", "--seed", "y", "z").startswith("3 problems in the configuration:")


def test_main_config_prints_the_problem_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main_config(["--num-layer", "3"])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out) == (2, "")
    assert shown.err == "error: unknown flag --num-layer. Did you mean '--num-layers'?\n"


def test_main_config_checks_what_needs_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main_config(["--recipe", "debug_cpu.yaml", "--tensor-model-parallel-size", "3"])
    assert stop.value.code == 2
    assert "--num-attention-heads 8 (recipes/debug_cpu.yaml) is not divisible by" in capsys.readouterr().err
    config = main_config(["--recipe", "debug_cpu.yaml", "--tensor-model-parallel-size", "2"])
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.model.ffn_hidden_size is None, "derived values wait for the number of ranks"


def test_print_config_is_a_recipe_with_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--recipe", "debug_cpu.yaml", "--tensor-model-parallel-size", "2", "--lr", "2e-3"]
    with pytest.raises(SystemExit) as stop:
        main_config([*argv, "--print-config"])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.err) == (0, "")
    assert "# Derived values are those of 2 ranks." in shown.out
    assert "  lr: 0.002  # flag --lr\n" in shown.out
    assert "  # ffn_hidden_size: 192  # derived: 8/3 · hidden-size" in shown.out
    layer = parse_recipe(shown.out, "printed")[1]
    config = parse_run_config(argv)
    assert all(value_of(config, key) == setting.value for key, setting in layer.items())


def test_print_config_shows_what_is_missing_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main_config(["--print-config"])
    shown = capsys.readouterr()
    assert stop.value.code == 0
    assert "  num_layers: 12  # default\n" in shown.out
    assert "problem: neither --data-path nor --mock-data is given" in shown.err


def test_help_is_grouped_and_shows_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main_config(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    order = [text.index(f"\n{section}:\n") for section in SECTIONS]
    assert order == sorted(order)
    assert text.index("--num-layers N") < text.index("\nparallel:\n") < text.index("--tensor-model-parallel-size N")
    assert "Number of transformer blocks. (default: 12)" in text
    assert "(default: derived)" in text
    assert "Steps to train, counted from the beginning of training. (default: none)" in text
    assert "--overlap-grad-reduce, --no-overlap-grad-reduce" in text
    assert "(default: on)" in text
    assert "--normalization {RMSNorm,LayerNorm}" in text
    assert "--recompute-modules {core_attn,mlp,layernorm}" in text
    assert "(default: core_attn)" in text


@pytest.mark.parametrize("argv", [["--help"], ["--nonsense"], ["--recipe", "debug_cpu.yaml", "--print-config"]])
def test_answers_without_importing_torch(argv: list[str]) -> None:
    code = (
        "import sys\nfrom megazero.config.flags import main_config\n"
        "try:\n    main_config(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
