"""Answers: drawn from the model's own probabilities, the same in any order of rows, ended where they end."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.parallel.topology import Topology
from megazero.rlhf.rollout import Noise, Rollout, Sampling, mask_of_answers, roll_out, sample_keys
from tests.rlhf.tiny import EOS, FAMILIES, PAD, PROMPTS, VOCAB, engine, language_model, trainer

SAMPLING = Sampling(PAD, (EOS,), max_answer_seq_len=6)
MASK = (PROMPTS != PAD).long()


def rolled(actor: Any, prompts: Tensor = PROMPTS, step: int = 0, **changed: Any) -> Rollout:
    settings = {"pad": PAD, "stops": (EOS,), "max_answer_seq_len": 6} | changed
    return roll_out(actor, prompts, (prompts != PAD).long(), Sampling(**settings), step)


def draw_many(logits: Tensor, number: int, **changed: Any) -> Tensor:
    """Tokens drawn by the noise of so many equal prompts."""
    settings = {"pad": PAD, "stops": (EOS,)} | changed
    noise = Noise(Sampling(**settings), 3, 5, torch.full((number,), 77), torch.arange(number))
    return noise(torch.zeros(number, 7, dtype=torch.int64), logits.expand(number, -1)).argmax(1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_have_the_models_probabilities(temperature: float) -> None:
    logits, number = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0]), 20_000
    counts = torch.bincount(draw_many(logits, number, temperature=temperature), minlength=6).double()
    expected = (logits.double() / temperature).softmax(0) * number
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 15.1  # 5 degrees of freedom: exceeded once in a hundred


def test_tokens_of_one_sample_do_not_depend_on_each_other() -> None:
    """Two positions, and two seeds, of the same samples: as often equal as independent draws."""
    logits, number = torch.zeros(8), 20_000
    ids = [torch.zeros(number, length, dtype=torch.int64) for length in (5, 6)]
    noise = Noise(SAMPLING, 0, 5, torch.full((number,), 77), torch.arange(number))
    first, second = (noise(each, logits.expand(number, -1)).argmax(1) for each in ids)
    for other in (second, draw_many(logits, number, seed=5)):
        assert float((first == other).double().mean()) == pytest.approx(1 / 8, abs=0.01)


def test_temperature_0_takes_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9])
    assert draw_many(logits, 50, temperature=0.0).eq(1).all()
    actor = engine(language_model().eval(), trained=True)
    found = rolled(actor, temperature=0.0).sequences
    settings: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": PAD, "do_sample": False}
    assert torch.equal(found, actor.module.generate(PROMPTS, attention_mask=MASK, **settings))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_that_training_sees(family: str, temperature: float) -> None:
    """Drawn with a cache, a token at a time, and computed anew over the whole padded row."""
    from megazero.rlhf import PPOConfig

    made = trainer(family, PPOConfig(max_answer_seq_len=6, temperature=temperature))
    experience = made.generate_experience(PROMPTS)
    drawn = roll_out(made.actor, PROMPTS, MASK, made.sampling, 0)
    assert torch.equal(drawn.sequences, experience["input_ids"]) and drawn.answer_mask.sum() < drawn.answer_mask.numel()
    answers = experience["logprobs"][:, PROMPTS.shape[1] - 1 :] * experience["answer_mask"]
    torch.testing.assert_close(answers, drawn.log_probs, rtol=0, atol=5e-6)
    assert answers.min() < -1 and (answers[drawn.answer_mask != 0] < 0).all()


def test_answers_belong_to_prompts_not_to_rows() -> None:
    actor = engine(language_model().eval(), trained=True)
    order = torch.tensor([2, 3, 1, 0])
    found, moved = rolled(actor), rolled(actor, PROMPTS[order])
    assert torch.equal(moved.sequences[[0, 2]], found.sequences[[2, 1]])
    twins = found.sequences[[0, 3]]
    assert torch.equal(moved.sequences[[1, 3]], twins), "equal prompts are counted in the order of rows"
    assert not torch.equal(twins[0], twins[1]) and not torch.equal(rolled(actor, step=1).sequences, found.sequences)
    assert not torch.equal(rolled(actor, seed=1).sequences, found.sequences)
    wider = torch.cat([torch.zeros(4, 2, dtype=torch.int64), PROMPTS], 1)
    assert torch.equal(rolled(actor, wider).sequences[:, 2:], found.sequences)


def check_keys() -> tuple[list[int], list[int]]:
    group = Topology.build(dp=2).group("dp")
    prompts = [PROMPTS[:3], PROMPTS[2:]][group.rank]  # ranks with different numbers of rows
    crc, number = sample_keys(prompts, (prompts != PAD).long(), group)
    return crc.tolist(), number.tolist()


def test_equal_prompts_are_counted_over_all_ranks(ranks: Any) -> None:
    (crc, numbers), (other, more) = ranks.run(check_keys, 2)
    assert numbers == [0, 0, 0] and more == [1, 1] and crc[2] == other[0] and crc[0] == other[1]
    assert len({*crc, *other}) == 3


@pytest.mark.parametrize(
    ("answer", "pad", "stops", "length"),
    [
        ([5, 2, 0, 0], 0, (2,), 2),
        ([5, 0, 2, 0], 0, (2,), 3),  # a pad that was drawn
        ([5, 6, 7, 8], 0, (2,), 4),
        ([5, 6, 0, 0], 0, (2,), 2),
        ([5, 2, 2, 2], 2, (2,), 2),  # pad = eos
        ([2, 2, 2, 2], 2, (2,), 1),
        ([0, 0, 0, 0], 0, (2,), 1),
        ([5, 0, 0, 0], 0, (), 1),
        ([5, 9, 2, 0], 0, (2, 9), 2),
    ],
)
def test_where_answers_end(answer: list[int], pad: int, stops: tuple[int, ...], length: int) -> None:
    found = mask_of_answers(torch.tensor([answer]), Sampling(pad, stops))
    assert found.tolist() == [[1] * length + [0] * (4 - length)]


def test_a_repetition_penalty_of_the_models_own_is_not_drawn_with() -> None:
    actor = engine(language_model().eval(), trained=True)
    wanted = rolled(actor).sequences
    own = actor.module.generation_config
    own.repetition_penalty, own.min_new_tokens = 5.0, 6
    assert torch.equal(rolled(actor).sequences, wanted)
    assert actor.module.generation_config is own


def check_lengths() -> list[int]:
    actor = engine(language_model().eval(), trained=True, stage=3)
    stops = tuple(range(VOCAB)) if actor.topology.rank == 0 else ()  # one token here, all of them there
    found = rolled(actor, stops=stops)
    assert found.log_probs.shape == found.answer_mask.shape
    assert (found.log_probs[:, 0] < 0).all() and torch.equal(found.log_probs != 0, found.answer_mask != 0)
    return list(found.sequences.shape)


def test_ranks_that_end_early_go_on_for_the_others(ranks: Any) -> None:
    assert ranks.run(check_lengths, 2) == [[4, 5 + 1], [4, 5 + 6]]


class Mute(nn.Module):
    """Generates without asking anyone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def generate(self, ids: Tensor, **settings: Any) -> Tensor:
        return torch.cat([ids, ids[:, -1:]], 1)


def test_what_it_refuses() -> None:
    with pytest.raises(
        ConfigError, match=r"module, Linear, has no generate\(\), which draws answers. Take one of Hugg"
    ):
        rolled(engine(nn.Linear(2, 2), trained=True))
    with pytest.raises(ConfigError, match=r"Mute.generate\(\) calls no logits_processor, .* Let it call each"):
        rolled(engine(Mute(), trained=True))
    actor = engine(language_model(), trained=True)
    said = "up to 28 tokens .* to a prompt of 5: 33 in all, and LlamaForCausalLM has 32 positions. Lower max_answer_"
    with pytest.raises(ConfigError, match=said):
        rolled(actor, max_answer_seq_len=28)


def test_a_module_that_generates_by_itself() -> None:
    """Hugging Face's keywords are all that is asked of it."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

        def forward(self, ids: Tensor) -> Any:
            return types.SimpleNamespace(logits=self.head(self.embed(ids)))

        def generate(self, ids: Tensor, *, max_new_tokens: int, logits_processor: Any, **settings: Any) -> Tensor:
            for _ in range(max_new_tokens):
                scores = logits_processor(ids, self(ids).logits[:, -1])
                ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
            return ids

    found = rolled(engine(Loop(), trained=True))
    assert found.sequences.shape == (4, 11) and (found.log_probs[:, 0] < 0).all()
