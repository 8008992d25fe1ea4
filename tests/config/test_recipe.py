"""Recipes: reading, inheritance, every refusal, and writing a configuration back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megazero.base.errors import ConfigError
from megazero.config import recipe as recipe_module
from megazero.config.fields import FIELDS, value_of
from megazero.config.layers import Setting, assemble
from megazero.config.recipe import RECIPES, parse_recipe, read_recipe, resolved_values, to_yaml
from megazero.config.schema import RunConfig, TrainingConfig
from megazero.config.validate import resolve
from tests.config.settings import config_with, layers


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder beside an empty checkout folder of recipes."""
    (tmp_path / "work").mkdir()
    (tmp_path / "checkout" / "recipes").mkdir(parents=True)
    monkeypatch.setattr(recipe_module, "RECIPES", tmp_path / "checkout" / "recipes")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_recipe(text, "r.yaml")
    return str(error.value)


def test_reads_values_by_the_fields_types() -> None:
    base, layer = parse_recipe(
        "base: parent.yaml\n"
        "optimizer:\n  lr: 3e-4\n  adam_eps: 1E-8\n"
        "data:\n  data_path: [0.7, a, 0.3, b]\n  mock_data: no\n"
        "training: {train_iters: 1_000, precision: bf16}\n"
        "checkpoint:\n  # every line of this section is a comment\n",
        "r.yaml",
    )
    assert base == "parent.yaml"
    assert layer == {
        "optimizer.lr": Setting(3e-4, "r.yaml"),
        "optimizer.adam_eps": Setting(1e-8, "r.yaml"),
        "data.data_path": Setting(("0.7", "a", "0.3", "b"), "r.yaml"),
        "data.mock_data": Setting(False, "r.yaml"),
        "training.train_iters": Setting(1000, "r.yaml"),
        "training.precision": Setting("bf16", "r.yaml"),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n\tnum_layers: 2\n", "r.yaml line 2: a tab; YAML is indented with spaces. Replace the tab by spaces."),
        ("model:\n  num_layers: 2\n \thidden_size: 64\n", "r.yaml line 3: a tab; YAML is indented with spaces."),
        ("model: {num_layers: 2\n", "r.yaml line 2: not valid YAML: expected ',' or '}'"),
        ("model:\n  num_layers: 2\n num_layers: 3\n", "r.yaml line 3: not valid YAML: "),
        (
            "model:\n  num_layers: 2\n  num_layers: 3\n",
            "r.yaml line 3: not valid YAML: the key 'num_layers' is given twice. Correct that line.",
        ),
        ("a: 1\n---\nb: 2\n", "r.yaml line 2: not valid YAML: but found another document. Correct that line."),
        ("model: !!python/object:os.system {}\n", "r.yaml line 1: not valid YAML: could not determine a constructor"),
        (
            "",
            "r.yaml: a recipe is a mapping of sections (model, parallel, offload, data, training, ",
        ),
        ("# nothing\n", "r.yaml: a recipe is a mapping of sections"),
        ("- model\n", "r.yaml: a recipe is a mapping of sections"),
        ("base: [a, b]\n", "r.yaml: base: expected the name of one recipe, got ['a', 'b']."),
        ("model: 3\n", "r.yaml: model: expected `key: value` lines, got 3."),
        (
            "modle:\n  num_layers: 2\n",
            "r.yaml: unknown section 'modle'. Did you mean 'model'? There are model, parallel,",
        ),
        ("lr: 3e-4\n", "r.yaml: 'lr' stands outside its section; write it under `optimizer:`."),
        ("model:\n  num_layer: 2\n", "r.yaml: unknown key 'num_layer' in `model`. Did you mean 'num_layers'?"),
        ("model:\n  lr: 1\n", "r.yaml: unknown key 'lr' in `model`; it belongs under `optimizer:`."),
        ("model:\n  qqqq: 1\n", "r.yaml: unknown key 'qqqq' in `model`."),
        (
            "training:\n  num_laye: 1\n",
            "r.yaml: unknown key 'num_laye' in `training`. Did you mean 'model.num_layers'?",
        ),
        (
            "training:\n  bf16: true\n",
            "r.yaml: unknown key 'bf16' in `training`: in a recipe write `precision: bf16` under",
        ),
        (
            "model:\n  group_query_attention: true\n",
            "r.yaml: unknown key 'group_query_attention' in `model`: in a recipe",
        ),
        (
            "training:\n  batch_size: 4\n",
            "r.yaml: unknown key 'batch_size' in `training`: renamed to --micro-batch-size.",
        ),
        ("model:\n  num_layers: two\n", "r.yaml: model.num_layers: expected a whole number, got 'two'."),
        ("model:\n  num_layers:\n", "r.yaml: model.num_layers: expected a whole number, got nothing; give a value or"),
        (
            "logging:\n  wandb_exp_name: 2024-01-02\n",
            "r.yaml: logging.wandb_exp_name: expected text, got the date 2024",
        ),
        (
            "optimizer:\n  lr_decay_style: cosin\n",
            "r.yaml: optimizer.lr_decay_style: expected one of constant, linear,",
        ),
    ],
)
def test_refuses_in_one_line_that_names_file_and_key(text: str, words: str) -> None:
    message = refusal(text)
    assert message.startswith(words)
    assert "\n" not in message


def test_reports_all_problems_of_a_file_at_once() -> None:
    assert refusal("model:\n  num_layers: x\n  foo: 1\nlr: 1\n").startswith(
        "3 problems in the configuration:\n  - r.yaml:"
    )


def test_base_is_found_beside_the_file_then_in_the_checkout(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "child.yaml").write_text("base: middle.yaml\nmodel: {num_layers: 3}\n")
    (folder / "sub" / "middle.yaml").write_text("base: root.yaml\nmodel: {num_layers: 2, hidden_size: 20}\n")
    (recipe_module.RECIPES / "root.yaml").write_text("model: {num_layers: 1, hidden_size: 10, vocab_size: 5}\n")
    (recipe_module.RECIPES / "middle.yaml").write_text("model: {num_layers: 99}\n")
    config = assemble(read_recipe("sub/child.yaml"))
    assert (config.model.num_layers, config.origins["model.num_layers"]) == (3, "sub/child.yaml")
    assert (config.model.hidden_size, config.origins["model.hidden_size"]) == (20, "sub/middle.yaml")
    assert (config.model.vocab_size, config.origins["model.vocab_size"]) == (5, "recipes/root.yaml")


def test_a_recipe_is_found_as_given_then_in_the_checkout(folder: Path) -> None:
    (recipe_module.RECIPES / "a.yaml").write_text("model: {num_layers: 1}\n")
    assert read_recipe("a.yaml") == [{"model.num_layers": Setting(1, "recipes/a.yaml")}]
    (folder / "a.yaml").write_text("model: {num_layers: 2}\n")
    assert read_recipe("a.yaml") == [{"model.num_layers": Setting(2, "a.yaml")}]
    assert read_recipe(str(folder / "a.yaml")) == [{"model.num_layers": Setting(2, "a.yaml")}]


def test_missing_recipe_and_missing_base(folder: Path) -> None:
    (recipe_module.RECIPES / "debug_cpu.yaml").write_text("model: {num_layers: 1}\n")
    (folder / "child.yaml").write_text("base: debug_cp.yaml\n")
    tail = "Did you mean 'debug_cpu.yaml'? recipes/ has debug_cpu.yaml."
    with pytest.raises(ConfigError) as error:
        read_recipe("debug_cp.yaml")
    places = "(looked at debug_cp.yaml and recipes/debug_cp.yaml)"
    assert str(error.value) == f"--recipe debug_cp.yaml: no such file {places}. {tail}"
    with pytest.raises(ConfigError) as error:
        read_recipe("child.yaml")
    assert str(error.value) == f"child.yaml: base: debug_cp.yaml: no such file {places}. {tail}"


def test_circular_base(folder: Path) -> None:
    (folder / "a.yaml").write_text("base: b.yaml\n")
    (folder / "b.yaml").write_text("base: a.yaml\n")
    (folder / "self.yaml").write_text("base: self.yaml\n")
    with pytest.raises(ConfigError) as error:
        read_recipe("a.yaml")
    assert str(error.value).startswith("b.yaml: base: a.yaml closes a circle (a.yaml -> b.yaml -> a.yaml); remove one")
    with pytest.raises(ConfigError, match=r"self.yaml closes a circle \(self.yaml -> self.yaml\)"):
        read_recipe("self.yaml")


def test_file_that_is_no_text_or_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "binary.yaml").write_bytes(b"model:\n\xff\xfe\n")
    with pytest.raises(ConfigError) as error:
        read_recipe("binary.yaml")
    assert str(error.value) == "binary.yaml is not UTF-8 text (byte 7); a recipe is a YAML text file."

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError) as error:
        read_recipe("binary.yaml")
    assert str(error.value) == "binary.yaml cannot be read: Permission denied. Check the path and its permissions."


@given(layers("some file"))
def test_a_written_configuration_reads_back_equal(layer: dict[str, Setting]) -> None:
    config = assemble([layer])
    base, back = parse_recipe(to_yaml(config), "config.yaml")
    assert base is None
    assert set(back) == set(FIELDS)
    assert assemble([back]) == config


@given(st.text())
def test_any_text_survives_on_one_line(text: str) -> None:
    config = config_with(training__sample_prompt=text)
    written = to_yaml(config)
    assert parse_recipe(written, "c")[1]["training.sample_prompt"].value == text
    assert len(written.split("\n")) == len(to_yaml(config_with()).split("\n"))


def test_a_resolved_configuration_resolves_again_from_its_file() -> None:
    config = resolve(config_with(training__global_batch_size=8, logging__output_dir="runs/a"), 4)
    again = resolve(assemble([parse_recipe(to_yaml(config), "config.yaml")[1]]), 4)
    assert again == config


def test_every_value_is_written_with_its_origin() -> None:
    text = to_yaml(resolve(config_with(model__num_layers=3), 1))
    assert "  num_layers: 3  # flag --num-layers\n" in text
    assert "  seed: 1234  # default\n" in text
    assert "  # kv_channels: 8  # derived: hidden-size / num-attention-heads\n" in text
    lines = [line.strip().removeprefix("# ") for line in text.splitlines()]
    for field in FIELDS.values():
        assert sum(line.startswith(f"{field.name}: ") and "  # " in line for line in lines) == 1, field.key
    assert yaml.safe_load(text)["model"]["num_layers"] == 3


def test_derived_values_do_not_tie_a_new_run_to_the_old_folder() -> None:
    config = resolve(config_with(logging__output_dir="runs/a"), 1)
    layer = parse_recipe(to_yaml(config), "runs/a/config.yaml")[1]
    moved = resolve(assemble([layer, {"logging.output_dir": Setting("runs/b", "flag --output-dir")}]), 1)
    assert (moved.checkpoint.save, moved.data.data_cache_path) == ("runs/b/checkpoints", "runs/b/index-cache")


def test_a_value_set_by_a_program_says_so() -> None:
    assert "  seed: 7  # set by the program\n" in to_yaml(RunConfig(training=TrainingConfig(seed=7)))


def test_checkouts_recipes_are_where_the_reader_looks() -> None:
    assert (RECIPES / "debug_cpu.yaml").is_file()
    assert value_of(assemble(read_recipe("debug_cpu.yaml")), "model.num_layers") == 16


def test_what_was_written_is_read_back_with_the_derived_values() -> None:
    config = resolve(config_with(model__num_layers=3, logging__wandb_exp_name="a: b # c"), 1)
    values = resolved_values(to_yaml(config), "config.yaml")
    assert values.keys() == FIELDS.keys()
    as_written = {key: value_of(config, key) for key in FIELDS}
    assert values == {key: list(v) if isinstance(v, tuple) else v for key, v in as_written.items()}
    assert config.origins["model.ffn_hidden_size"].startswith("derived")


@pytest.mark.parametrize("text", ["", "- 1", "model: 3"])
def test_what_is_no_config_of_a_run_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"c\.yaml is not the config\.yaml of a run: it should be a mapping of sections"
    ):
        resolved_values(text, "c.yaml")
