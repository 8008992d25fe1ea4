"""The same prompts on one process and on several ranks: the same answers, experience, losses, gradients, weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megazero.rlhf import PPOConfig
from megazero.zero import safe_get_full_grad
from tests.rlhf.tiny import trainer

LENGTH, STEPS = 6, 2
ROWS = torch.tensor(
    [
        [0, 0, 5, 6, 7],
        [3, 4, 5, 6, 7],
        [0, 0, 0, 0, 9],
        [0, 0, 5, 6, 7],
        [0, 8, 9, 8, 9],
        [0, 0, 0, 0, 9],
        [0, 0, 0, 11, 4],
        [0, 5, 5, 5, 5],
    ]
)
"""Some are the same; ranks get different numbers of tokens."""
PER_TOKEN = ("logprobs", "ref_logprobs", "value")


def run(family: str, stage: int, accumulation: int) -> dict[str, Any]:
    """Two steps, each over all ROWS; what a rank has seen, as lists by micro-batch."""
    config = PPOConfig(max_answer_seq_len=LENGTH, temperature=0.8)
    made = trainer(family, config, stage=stage, gradient_accumulation_steps=accumulation)
    rank, ranks = made.actor.topology.rank, made.actor.topology.world_size
    gradients: list[dict[str, Tensor]] = []
    engines = {"actor": made.actor, "critic": made.critic}
    for name, engine in engines.items():
        _record(name, engine, gradients)
    seen: list[dict[str, Tensor]] = []
    losses: list[float] = []
    for _ in range(STEPS):
        for part in ROWS.chunk(accumulation):
            found = made.generate_experience(part.chunk(ranks)[rank])
            losses += [loss.item() for loss in made.train_rlhf(found)]
            missing = LENGTH - found["answer_mask"].shape[1]
            mask = F.pad(found["answer_mask"], (0, missing))
            tokens = {name: F.pad(found[name][:, 4:], (0, missing)) * mask for name in PER_TOKEN}
            ids = F.pad(found["input_ids"][:, 5:], (0, missing)) * mask
            seen.append({"ids": ids, "mask": mask, "rewards": found["rewards"]} | tokens)
    weights = {f"{key}.{name}": v for key, engine in engines.items() for name, v in engine.state_dict().items()}
    assert made.actor.global_steps == made.critic.global_steps == STEPS
    return {"seen": seen, "losses": losses, "gradients": gradients, "weights": weights}


def _record(key: str, engine: Any, gradients: list[dict[str, Tensor]]) -> None:
    """Note the engine's gradients before each update."""
    step = engine.step

    def recorded() -> None:
        if engine.is_gradient_accumulation_boundary():
            found = {f"{key}.{name}": safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
            gradients.append({name: value.clone() for name, value in found.items() if value is not None})
        step()

    engine.step = recorded


@cache
def alone(family: str, accumulation: int) -> dict[str, Any]:
    return run(family, 0, accumulation)


def check(family: str, stage: int, accumulation: int, wanted: dict[str, Any], ranks: int) -> None:
    found = run(family, stage, accumulation)
    rank = torch.distributed.get_rank()
    for mine, whole in zip(found["seen"], wanted["seen"], strict=True):
        for name, value in whole.items():
            part = value.chunk(ranks)[rank]
            if not part.is_floating_point():
                assert torch.equal(mine[name], part), name
            else:
                torch.testing.assert_close(mine[name], part, rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6, abs=1e-7)
    for mine, whole in zip(found["gradients"], wanted["gradients"], strict=True):
        assert mine.keys() == whole.keys()
        norm = torch.stack([value.norm() for value in whole.values()]).norm()
        for name, value in whole.items():
            assert (mine[name] - value).norm() <= 1e-4 * max(value.norm(), 1e-2 * norm), name
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=2e-5, msg=lambda t, n=name: f"{n}: {t}")


LAYOUTS = [(2, 0, 1), (2, 2, 1), (2, 3, 1), (4, 3, 1), (2, 0, 2), (2, 2, 2), (2, 3, 2)]


@pytest.mark.parametrize(("world", "stage", "accumulation"), LAYOUTS)
def test_ranks_agree_with_one_process(world: int, stage: int, accumulation: int, ranks: Any) -> None:
    ranks.run(check, world, "llama", stage, accumulation, alone("llama", accumulation), world)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_families_at_stage_3(family: str, ranks: Any) -> None:
    ranks.run(check, 2, family, 3, 1, alone(family, 1), 2)


def test_the_comparison_has_something_to_compare() -> None:
    found = alone("llama", 1)
    first, second = found["seen"]
    lengths = first["mask"].sum(1)
    assert lengths.unique().numel() > 1, "answers have different lengths"
    assert lengths[:4].sum() != lengths[4:].sum(), "a mean of the ranks' means is not the mean over tokens"
    assert not torch.equal(first["ids"][0], first["ids"][3]), "equal prompts have answers of their own"
    assert not torch.equal(first["ids"], second["ids"]) and all(abs(loss) > 1e-3 for loss in found["losses"])
