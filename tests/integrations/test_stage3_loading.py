"""What transformers does to a model that it has loaded while a stage 3 configuration is alive: more tokens, a new head.
Trained afterwards as one plain process trains it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megazero
from megazero.integrations import deepspeed as alias
from tests.zero.test_hugging_face import SETTINGS, configuration


class Stage3:
    """Stands for transformers' HfDeepSpeedConfig, which is another class when transformers was there first."""

    config = SETTINGS

    def is_zero3(self) -> bool:
        return True


@contextmanager
def stage_3() -> Iterator[None]:
    from transformers.integrations import deepspeed as theirs

    alive = Stage3()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # transformers has been imported
        alias.install()
    theirs.set_hf_deepspeed_config(alive)
    alone = not dist.is_initialized()
    try:
        yield
    finally:
        theirs.unset_hf_deepspeed_config()
        alias.uninstall()
        if alone and dist.is_initialized():  # transformers asks for it, the other tests of this process for none
            dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Rank and ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def load(auto: str, folder: str) -> Any:
    import transformers

    with stage_3():
        return getattr(transformers, auto).from_pretrained(folder)


def check_trained_like_plain(model: Any, plain: Any, **more: Any) -> None:
    """`plain` gets the values of `model` first; both train."""
    rank, size = place()
    engine = megazero.initialize(model=model, config=SETTINGS)[0]
    start = [engine.consolidated_state_dict()]
    if size > 1:
        dist.broadcast_object_list(start)
    assert all(value.isfinite().all() for value in start[0].values())
    plain.load_state_dict(start[0])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, eps=1e-6)
    engine.train()
    plain.train()
    for step in range(2):
        ids = torch.randint(0, 120, (2 * size, 8), generator=torch.Generator().manual_seed(step))
        labels = more.get("labels", ids)
        mine = slice(2 * rank, 2 * rank + 2)
        engine.backward(engine(input_ids=ids[mine], labels=labels[mine]).loss)
        engine.step()
        optimizer.zero_grad()
        plain(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    whole = engine.consolidated_state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=2e-5, msg=name)
        assert not torch.equal(value, start[0][name]) or name.endswith("k_proj.bias"), name


def check_more_tokens(family: str, tokens: int, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    rank, size = place()
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(configuration(family))
    if rank == 0:
        plain.save_pretrained(folder)
    if size > 1:
        dist.barrier()
    model = load("AutoModelForCausalLM", folder)
    with stage_3():
        model.resize_token_embeddings(tokens)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == tokens
    tied = family == "gpt2"
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    with megazero.zero.GatheredParameters([model.get_input_embeddings().weight, model.get_output_embeddings().weight]):
        kept = min(tokens, 128)
        for get in ("get_input_embeddings", "get_output_embeddings"):
            assert torch.equal(getattr(model, get)().weight[:kept], getattr(plain, get)().weight[:kept])
    plain.resize_token_embeddings(tokens)
    check_trained_like_plain(model, plain)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("family", "tokens"), [("gpt2", 136), ("llama", 136), ("llama", 120)])
def test_more_and_fewer_tokens(ranks: Any, tmp_path: Path, family: str, tokens: int, size: int) -> None:
    ranks.run(check_more_tokens, size, family, tokens, str(tmp_path / "model"))


def check_new_head(folder: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    rank, size = place()
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(configuration("llama"))
    base.config.pad_token_id = 0
    if rank == 0:
        base.save_pretrained(folder)
    if size > 1:
        dist.barrier()
    torch.manual_seed(5 + rank)
    model = load("AutoModelForSequenceClassification", folder)
    with megazero.zero.GatheredParameters(model.parameters()):
        assert model.score.weight.isfinite().all() and bool(model.score.weight.any())
        for name, value in base.model.named_parameters():
            assert torch.equal(model.get_parameter(f"model.{name}"), value), name
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    check_trained_like_plain(model, plain, labels=torch.arange(2 * size) % 2)


@pytest.mark.parametrize("size", [1, 2])
def test_a_head_that_the_files_have_not(ranks: Any, tmp_path: Path, size: int) -> None:
    ranks.run(check_new_head, size, str(tmp_path / "model"))
