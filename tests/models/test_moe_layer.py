"""The mixture of experts: equal to a plain loop over experts where nothing is dropped, and what is dropped where."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.models.moe_layer import (
    MoE,
    has_moe_layers,
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
)

H, E, TOKENS = 8, 4, 24


def feed_forward(h: int = H) -> nn.Module:
    return nn.Sequential(nn.Linear(h, 2 * h), nn.GELU(), nn.Linear(2 * h, h))


def layer(**settings: Any) -> MoE:
    """A layer whose experts differ, with a gate that has clear favourites."""
    torch.manual_seed(0)
    moe = MoE(H, feed_forward(), E, **{"top2_2nd_expert_sampling": False, **settings})
    for parameter in moe.deepspeed_moe.experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(moe.deepspeed_moe.gate.wg.weight, std=1.0)
    return moe


def plain_loop(moe: MoE, x: Tensor, k: int) -> Tensor:
    """Every token through each of its experts, one by one."""
    out = []
    for token in x.reshape(-1, H):
        p = (moe.deepspeed_moe.gate.wg.weight @ token).softmax(0)
        best = p.topk(k).indices.tolist()
        total = 1.0 if k == 1 else sum(p[e] for e in best)
        parts = [p[e] / total * moe.deepspeed_moe.experts.deepspeed_experts[e](token) for e in best]
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out).reshape(x.shape)


def gradients(moe: MoE, output: Tensor, x: Tensor) -> list[Tensor]:
    probe = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    return list(torch.autograd.grad((output * probe).sum(), [x, *moe.parameters()], materialize_grads=True))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("room", [{"capacity_factor": float(E)}, {"drop_tokens": False}], ids=["ample", "no drop"])
def test_equals_a_plain_loop_over_experts(k: int, room: dict[str, Any]) -> None:
    moe, x = layer(k=k, **room), torch.randn(2, TOKENS // 2, H, requires_grad=True)
    output, _, counts = moe(x)
    expected = plain_loop(moe, x, k)
    torch.testing.assert_close(output, expected)
    assert counts.sum() == TOKENS * k
    for ours, reference in zip(gradients(moe, output, x), gradients(moe, expected, x), strict=True):
        torch.testing.assert_close(ours, reference)


def test_the_seed_calls_it_so_and_every_expert_gets_a_gradient() -> None:
    moe = MoE(
        hidden_size=H, expert=feed_forward(), num_experts=E, ep_size=1, k=2, capacity_factor=1.25,
        eval_capacity_factor=2.0, min_capacity=4, use_residual=False,
    )  # fmt: skip
    x, aux, _ = moe(torch.randn(1, 2, H))  # two tokens cannot reach four experts in every draw
    (x.sum() + aux).backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_expert_takes_more_than_its_room(k: int) -> None:
    moe, x = layer(k=k, capacity_factor=0.5, min_capacity=1, use_rts=False), torch.randn(TOKENS, H)
    seen: list[Tensor] = []
    for expert in moe.deepspeed_moe.experts.deepspeed_experts:
        expert.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    moe(x)
    room = -(-TOKENS * k // (2 * E))
    assert [rows.shape for rows in seen] == [(room, H)] * E


def test_top_1_drops_the_last_tokens_of_an_expert_or_drawn_ones() -> None:
    moe, x = layer(k=1, capacity_factor=0.5, min_capacity=1, use_rts=False), torch.randn(TOKENS, H)
    room, full = TOKENS // (2 * E), plain_loop(moe, x, 1)
    chosen = (x @ moe.deepspeed_moe.gate.wg.weight.T).argmax(1)
    kept = torch.zeros(TOKENS, dtype=torch.bool)
    for e in range(E):
        kept[(chosen == e).nonzero()[:room]] = True
    torch.testing.assert_close(moe(x)[0], full * kept[:, None])

    moe.use_rts = True
    torch.manual_seed(3)
    drawn = moe(x)[0].abs().sum(1) > 0
    assert drawn.sum() == kept.sum() and not torch.equal(drawn, kept)
    moe.eval()
    moe.eval_capacity_factor = 0.5
    torch.testing.assert_close(moe(x)[0], full * kept[:, None])  # nothing is drawn in eval


def test_second_choices_go_before_first_ones_and_the_rest_of_the_weight_is_the_other_experts() -> None:
    moe, x = layer(k=2, capacity_factor=0.5, min_capacity=1), torch.randn(TOKENS, H)
    p = (x @ moe.deepspeed_moe.gate.wg.weight.T).softmax(1)
    first, second = p.topk(2).indices.T
    room, weights = -(-TOKENS // E), torch.zeros(TOKENS, E)
    for choice in (first, second):
        for token in range(TOKENS):
            if (weights[:, choice[token]] > 0).sum() < room:
                weights[token, choice[token]] = p[token, choice[token]]
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    made = torch.stack([expert(x) for expert in moe.deepspeed_moe.experts.deepspeed_experts], 1)
    torch.testing.assert_close(moe(x)[0], (weights[..., None] * made).sum(1))


def test_past_top_2_the_least_probable_choices_go() -> None:
    moe, x = layer(k=3, capacity_factor=0.5, min_capacity=1), torch.randn(TOKENS, H)
    p = (x @ moe.deepspeed_moe.gate.wg.weight.T).softmax(1)
    chosen = torch.zeros_like(p).scatter(1, p.topk(3).indices, 1) * p
    room = -(-TOKENS * 3 // (2 * E))
    least = chosen.topk(room, dim=0).values[-1]
    weights = chosen * (chosen >= least)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    made = torch.stack([expert(x) for expert in moe.deepspeed_moe.experts.deepspeed_experts], 1)
    torch.testing.assert_close(moe(x)[0], (weights[..., None] * made).sum(1))


def test_the_balancing_loss_is_1_for_an_even_load_and_more_for_one_favourite() -> None:
    moe = layer(k=1)
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(torch.eye(H)[:E] * 50)
    even = torch.eye(H)[:E].repeat(3, 1)
    assert moe(even)[1].item() == pytest.approx(1.0, abs=1e-4)
    assert moe(torch.eye(H)[:1].repeat(12, 1))[1].item() == pytest.approx(E, abs=1e-4)


@pytest.mark.parametrize(("k", "chosen"), [(2, 1), (3, 3)])
def test_balancing_loss_as_deepspeed_computes_it(k: int, chosen: int) -> None:
    moe, x = layer(k=k), torch.randn(TOKENS, H)
    p = (x @ moe.deepspeed_moe.gate.wg.weight.T).softmax(1)
    mask = torch.zeros_like(p).scatter(1, p.topk(chosen).indices, 1)
    expected = (p.mean(0) * mask.mean(0)).mean() * E * E / chosen
    torch.testing.assert_close(moe(x)[1], expected)


def test_residual_mixes_in_a_dense_expert() -> None:
    moe, x = layer(k=1, drop_tokens=False, use_residual=True), torch.randn(TOKENS, H)
    assert moe.mlp is not None and moe.coefficient is not None
    share = moe.coefficient(x).softmax(-1)
    torch.testing.assert_close(moe(x)[0], plain_loop(moe, x, 1) * share[:, :1] + moe.mlp(x) * share[:, 1:])


@pytest.mark.parametrize(
    "settings", [{"noisy_gate_policy": "RSample"}, {"k": 2, "top2_2nd_expert_sampling": True}], ids=["RSample", "2nd"]
)
def test_noise_draws_experts_in_training_only(settings: dict[str, Any]) -> None:
    moe, x = layer(**settings), torch.randn(TOKENS, H)
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.mul_(0.01)  # nearly even odds
    assert not torch.equal(moe(x)[2], moe(x)[2])
    moe.eval()
    assert torch.equal(moe(x)[2], moe(x)[2])


def test_jitter_moves_probabilities_a_little() -> None:
    moe, x = layer(noisy_gate_policy="Jitter", drop_tokens=False), torch.randn(TOKENS, H)
    difference = (moe(x)[0] - moe.eval()(x)[0]).abs().max()
    assert 0 < difference < 1


def test_the_gate_computes_in_fp32() -> None:
    moe = layer(k=2, drop_tokens=False)
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(moe.deepspeed_moe.gate.wg.weight.bfloat16())
    x = torch.randn(TOKENS, H).bfloat16()
    exact, _ = moe._choose(x.float())
    half, _ = copy.deepcopy(moe).bfloat16()._choose(x)
    assert half.dtype == torch.float32 and torch.equal(half, exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe._choose(x.float())[0], exact)


def test_experts_have_groups_of_their_own() -> None:
    block = nn.Sequential(nn.Linear(H, H), layer())
    group = {"params": list(block.parameters()), "name": "parameters", "lr": 0.5}
    dense, moe = split_params_into_different_moe_groups_for_optimizer(group)
    experts = list(block[1].deepspeed_moe.experts.parameters())
    assert all(map(is_moe_param, experts)) and [id(p) for p in moe["params"]] == [id(p) for p in experts]
    assert (moe["moe"], moe["name"], moe["lr"], dense["name"]) == (True, "ep_size_1", 0.5, "parameters")
    assert len(dense["params"]) + len(experts) == len(group["params"])

    most = H * 2 * H + 2 * H  # the first weight and its bias
    _, *parts = split_params_into_different_moe_groups_for_optimizer((group,), max_group_size=most)
    assert [len(part["params"]) for part in parts] == [2] * (2 * E)


def test_names_are_those_of_deepspeeds_checkpoints() -> None:
    names = set(layer().state_dict())
    assert {"deepspeed_moe.gate.wg.weight", "deepspeed_moe.experts.deepspeed_experts.3.2.bias"} <= names
    assert has_moe_layers(nn.Sequential(layer())) == (True, E) and has_moe_layers(nn.Linear(1, 1)) == (False, 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 5}, "k=5 with num_experts=4: a token takes 1 to 4 experts"),
        ({"ep_size": 3}, r"ep_size=3 with num_experts=4: .*Use an ep_size out of 1, 2, 4\."),
        ({"noisy_gate_policy": "jitter"}, "noisy_gate_policy='jitter' is none of None, 'Jitter', 'RSample'"),
        ({"use_tutel": True}, "use_tutel=True: .* Leave it out"),
        ({"enable_expert_tensor_parallelism": True}, "enable_expert_tensor_parallelism=True: .* Leave it out"),
    ],
)
def test_what_it_cannot_do_it_says(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        layer(**settings)
