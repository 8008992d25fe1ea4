"""The reward model: where scores are read, padding that changes no number, names, backbones, and engines of it."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.rlhf import RewardModel, pairwise_loss
from tests.rlhf.tiny import FAMILIES, VOCAB, engine, language_model, reward_model, tokenizer

TEXT = [5, 6, 7, 8]


class Backbone(nn.Module):
    """A backbone that is nobody's: hidden states alone, no mask."""

    def __init__(self, width: int | None = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 4)
        if width is not None:
            self.config = types.SimpleNamespace(hidden_size=width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_score(family: str) -> None:
    model = reward_model(family, 0).eval()
    ids = torch.tensor([TEXT])
    with torch.no_grad():
        wanted = model.v_head(model.rwtransformer(ids)[0])[0, -1]  # [1]
        rows = torch.tensor([[0, 0, *TEXT, 0], [*TEXT, 0, 0, 0], [0, 0, 0, *TEXT]])
        for mask in (None, rows != 0):
            torch.testing.assert_close(model(rows, mask), wanted.expand(3), rtol=0, atol=1e-6)
        assert not torch.allclose(model.rwtransformer(rows[:1])[0][:, -2], model.rwtransformer(ids)[0][:, -1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("row", "kept", "prompt", "place"),
    [
        ([5, 6, 7, 8], 0, 0, 3),
        ([5, 6, 0, 0], 0, 0, 1),
        ([5, 0, 6, 0], 0, 0, 0),
        ([0, 0, 5, 0], 0, 0, 2),
        ([0, 5, 6, 0], 1, 0, 2),  # OPT's </s> first
        ([0, 0, 5, 0], 1, 0, 2),
        ([5, 0, 6, 0], 0, 2, 2),  # a pad in the prompt's part
        ([0, 5, 0, 0], 0, 2, 1),  # no answer
    ],
)
def test_where_a_row_ends(row: list[int], kept: int, prompt: int, place: int) -> None:
    model = RewardModel(Backbone(), tokenizer(), num_padding_at_beginning=kept)
    ids = torch.tensor([row])
    values = model(ids, return_value_only=True)
    assert values.shape == (1, 4)
    found = model.forward_value(ids, prompt_length=prompt)
    assert isinstance(found, dict) and torch.equal(found["values"], values)
    assert float(found["chosen_end_scores"]) == float(values[0, place])
    if not prompt:
        assert float(model(ids)) == float(values[0, place])
    assert torch.equal(model.forward_value(ids, return_value_only=True, use_cache=False, past_key_values=None), values)
    mask = torch.tensor([[1, 1, 0, 0]])
    assert float(model(ids, mask)) == float(values[0, 1])


def test_a_leading_pad_that_is_kept_is_seen() -> None:
    """Of two leading pads one is padding and one OPT's </s>."""
    model = reward_model("opt", 0).eval()
    model.num_padding_at_beginning = 1
    ids = torch.tensor([[0, 0, *TEXT]])
    with torch.no_grad():
        wanted = model.v_head(model.rwtransformer(ids[:, 1:])[0])[0, -1]
        torch.testing.assert_close(model(ids), wanted, rtol=0, atol=1e-6)
        assert not torch.allclose(model(ids, ids != 0), wanted)


def test_names_and_backbones() -> None:
    plain = language_model("gpt2")
    model = RewardModel(plain, tokenizer())
    names = set(model.state_dict())
    assert {"v_head.weight", "rwtransformer.wte.weight", "rwtransformer.h.0.attn.c_attn.weight"} <= names
    assert names == {"v_head.weight"} | {f"rwtransformer.{name}" for name in plain.transformer.state_dict()}
    assert RewardModel(plain.transformer, tokenizer()).rwtransformer is plain.transformer is model.rwtransformer
    opt = RewardModel(language_model("opt").bfloat16(), tokenizer())
    assert opt.v_head.weight.shape == (1, 8) and opt.v_head.weight.dtype == torch.bfloat16  # word_embed_proj_dim
    both = Backbone(None)
    both.config = types.SimpleNamespace(text_config=types.SimpleNamespace(n_embd=4))
    assert RewardModel(both, tokenizer())(torch.tensor([TEXT])).shape == (1,)


def test_adapters_stay_in_the_backbone() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = RewardModel(peft.get_peft_model(language_model("llama"), settings), tokenizer())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 1 + 2 * 2 and "v_head.weight" in trained
    assert "rwtransformer.layers.0.self_attn.q_proj.lora_A.default.weight" in trained


def test_checkpointing_recomputes_the_blocks() -> None:
    model, ids = reward_model("llama", 0).train(), torch.tensor([TEXT])
    calls: list[int] = []
    model.rwtransformer.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for switch, expected in ((model.gradient_checkpointing_enable, 2), (model.gradient_checkpointing_disable, 1)):
        switch()
        calls.clear()
        gradients.append(torch.autograd.grad(model(ids).sum(), model.v_head.weight)[0])
        model(ids).sum().backward()
        assert len(calls) == 1 + expected
    assert torch.equal(*gradients)


def test_what_it_refuses() -> None:
    ids = torch.tensor([TEXT, [0, 0, 0, 0]])
    model = RewardModel(Backbone(), tokenizer())
    with pytest.raises(ValueError, match=r"row 1 holds nothing but the pad token 0. Leave rows without text out"):
        model(ids)
    with pytest.raises(ValueError, match=r"row 0 of the attention mask is 0 throughout. Leave"):
        model(ids, torch.tensor([[0] * 4, [1] * 4]))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 4\) for ids of shape \(2, 4\). Give 1 or 0"):
        model(ids, torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"forward_value\(\) makes no use of use_cache. Leave it out"):
        model.forward_value(ids[:1], use_cache=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"has no pad token, .* tokenizer.pad_token = tokenizer.eos_token"):
        RewardModel(Backbone(), types.SimpleNamespace(pad_token_id=None))
    with pytest.raises(ConfigError, match=r"how wide Backbone's hidden states are is unknown: .* hidden_size, .*Give"):
        RewardModel(Backbone(None), tokenizer())


# engines of it

CHOSEN = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [0, 9, 9, 9], [4, 5, 6, 0]])
REJECTED = torch.tensor([[5, 6, 9, 8], [5, 9, 9, 0], [0, 9, 9, 8], [4, 5, 0, 0]])


def check_two_calls(stage: int, family: str) -> None:
    """engine(…) twice before one backward: the weights after two steps are those of plain torch in one process."""
    made = engine(reward_model(family, 1), trained=True, stage=stage, gradient_clipping=0.0)
    plain = reward_model(family, 1)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-5)
    rank, ranks = made.topology.rank, made.topology.world_size
    mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    for _ in range(2):
        made.backward(pairwise_loss(made(CHOSEN[mine]), made(REJECTED[mine])))
        made.step()
        optimizer.zero_grad()
        pairwise_loss(plain(CHOSEN), plain(REJECTED)).backward()
        optimizer.step()
    whole = made.state_dict()
    assert whole.keys() == plain.state_dict().keys()
    for name, wanted in plain.state_dict().items():
        torch.testing.assert_close(whole[name], wanted, rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    with torch.no_grad():
        values = made.forward_value(CHOSEN, return_value_only=True)
        torch.testing.assert_close(values, plain(CHOSEN, return_value_only=True), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_two_calls_before_a_backward(world: int, stage: int, ranks: Any) -> None:
    for family in FAMILIES if stage == 3 else ["llama"]:
        ranks.run(check_two_calls, world, stage, family)


def check_bf16(stage: int) -> None:
    made = engine(reward_model("gpt2", 1), trained=True, stage=stage, bf16={"enabled": True})
    losses = []
    for _ in range(5):
        loss = pairwise_loss(made(CHOSEN), made(REJECTED))
        made.backward(loss)
        made.step()
        losses.append(loss.item())
    assert made(CHOSEN).dtype == torch.bfloat16 and losses[-1] < losses[0]


def test_bf16(ranks: Any) -> None:
    for stage in (0, 3):
        ranks.run(check_bf16, 2, stage)
