"""`resolve`: the door from settings to a run."""

from __future__ import annotations

import pytest

from megazero.base.errors import ConfigError
from megazero.config.layers import Setting, with_settings
from megazero.config.schema import DataConfig, RunConfig, TrainingConfig, TransformerConfig
from megazero.config.validate import resolve
from tests.config.settings import config_with


def test_resolving_fills_in_and_resolving_again_changes_nothing() -> None:
    changes = {"training__train_iters": None, "training__train_samples": 64, "training__global_batch_size": 8}
    config = resolve(config_with(**changes), 2)
    assert (config.training.train_iters, config.model.kv_channels) == (8, 8)
    assert config.optimizer.lr_decay_iters is None
    again = resolve(config, 2)
    assert again == config
    assert again.origins == config.origins


def test_one_problem_is_one_line_and_several_are_a_list() -> None:
    with pytest.raises(ConfigError) as error:
        resolve(config_with(model__num_query_groups=3), 1)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="2 problems in the configuration:"):
        resolve(config_with(model__num_query_groups=3, checkpoint__finetune=True), 1)


def test_vocabulary_may_wait_for_the_tokenizer_and_is_checked_once_known() -> None:
    changes = {"model__vocab_size": None, "data__tokenizer_model": "t", "model__make_vocab_size_divisible_by": 1}
    config = resolve(config_with(**changes, parallel__tensor_model_parallel_size=2), 2)
    assert config.model.vocab_size is None
    known = with_settings(config, {"model.vocab_size": Setting(101, "tokenizer t")})
    with pytest.raises(ConfigError, match=r"--vocab-size 101 \(tokenizer t\) padded to a multiple of 1 is 101"):
        resolve(known, 2)


def test_a_configuration_built_in_code_needs_no_origins() -> None:
    config = RunConfig(
        model=TransformerConfig(vocab_size=100),
        data=DataConfig(mock_data=True),
        training=TrainingConfig(train_samples=10),
    )
    assert resolve(config, 1).training.train_iters == 10
