"""`deepspeed_chat`: where it is found, and how a namespace of arguments becomes a trainer."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megazero.base.errors import ConfigError
from megazero.integrations import deepspeed as alias
from megazero.integrations.deepspeed_chat import DeepSpeedPPOTrainer, config_of
from megazero.rlhf import PPOConfig, RewardModel
from tests.rlhf.tiny import EOS, PROMPTS, engines, tokenizer


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # other tests of this session have imported transformers
        alias.install()
    yield
    alias.uninstall()


def test_where_it_is_found() -> None:
    reward, trainer = (importlib.import_module(f"deepspeed_chat.{name}") for name in ("reward_model", "ppo_trainer"))
    assert reward.RewardModel is RewardModel and trainer.DeepSpeedPPOTrainer is DeepSpeedPPOTrainer
    with pytest.raises(ImportError, match=r"megazero has no .*Unsupervised. Train on the pretraining batches between"):
        exec("from deepspeed_chat.ppo_trainer import DeepSpeedPPOTrainerUnsupervised", {})
    with pytest.raises(ImportError, match=r"knows no deepspeed_chat.ppo_trainr. Did you mean deepspeed_chat.ppo_train"):
        importlib.import_module("deepspeed_chat.ppo_trainr")
    alias.uninstall()
    assert importlib.util.find_spec("deepspeed_chat") is None and "deepspeed_chat" not in sys.modules


def test_a_package_of_the_scripts_own_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed_chat").mkdir()
    (tmp_path / "deepspeed_chat" / "__init__.py").write_text("mine = True\n")
    (tmp_path / "deepspeed_chat" / "reward_model.py").write_text("mine = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("deepspeed_chat", "deepspeed_chat.reward_model"):
        assert importlib.import_module(name).mine
        monkeypatch.delitem(sys.modules, name)


def test_arguments() -> None:
    given = {"temperature": 0.5, "seed": 7, "print_answers": True, "print_answers_interval": 3, "kl_ctl": 0.2}
    args = types.SimpleNamespace(max_answer_seq_len=9, **given, align_overflow=False, cliprange=None, stop_token_ids=3)
    assert config_of(args, tokenizer()) == PPOConfig(max_answer_seq_len=9, **given)
    args = types.SimpleNamespace(max_answer_seq_len=9, end_of_conversation_token="11")
    assert config_of(args, tokenizer()).stop_token_ids == (11,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_answer_seq_len": None}, r"args.max_answer_seq_len is missing: .* Set it \(256, say\)"),
        ({"align_overflow": True}, "args.align_overflow: .* or train in bf16, which does not overflow"),
        (
            {"end_of_conversation_token": "<|end|>"},
            r"'<|end|>' is no token .* \(its own is '</s>'\), or add it: tokeni",
        ),
        ({"temperature": -1.0}, "temperature -1.0 must be 0 or more"),
    ],
)
def test_arguments_that_are_refused(changed: dict[str, Any], said: str) -> None:
    args = types.SimpleNamespace(**({"max_answer_seq_len": 9} | changed))
    with pytest.raises(ConfigError, match=said.replace("|", r"\|")):
        config_of(args, tokenizer())


def test_a_trainer_of_any_object_with_four_engines() -> None:
    parts = engines()
    holder = types.SimpleNamespace(**{name: getattr(parts, name) for name in ("actor", "critic", "ref", "reward")})
    args = types.SimpleNamespace(max_answer_seq_len=5)
    with pytest.raises(ConfigError, match=r"rlhf_engine \(SimpleNamespace\) has no tokenizer. Give it actor, critic"):
        DeepSpeedPPOTrainer(rlhf_engine=holder, args=args)
    holder.tokenizer = parts.tokenizer
    for given in (holder, parts):
        trainer = DeepSpeedPPOTrainer(given, args)
        assert trainer.args is args and trainer.sampling.stops == (EOS,)
        out = trainer.generate_experience(PROMPTS, PROMPTS != 0, 3)
        assert out["answer_mask"].shape[1] <= 5 and len(trainer.train_rlhf(out)) == 2
