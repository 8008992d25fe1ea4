"""The engine against plain torch training, and what it does with numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.base.errors import NonFiniteError
from megazero.models.gpt import GPT
from megazero.parallel.collectives import gather_objects
from megazero.parallel.random import initial_values
from megazero.parallel.topology import Topology
from tests.engine.toys import (
    LR,
    assert_weights,
    decay_groups,
    engine_of,
    global_batch,
    loss_sum,
    make_toy,
    masters,
    micro_batches,
    run_step,
)

STEPS = 6


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def check_plain(stage: int, clip: float) -> None:
    """The mean over the global batch's unmasked tokens, one backward, torch's clip, torch's AdamW."""
    engine = engine_of(zero_stage=stage, clip_grad=clip, weight_decay=0.1)
    plain = make_toy()
    optimizer = torch.optim.AdamW(decay_groups(plain, 0.1), lr=LR, betas=(0.9, 0.95), eps=1e-8)
    clipped = 0
    for step in range(STEPS):
        lr = LR * (step + 1) / STEPS
        result = run_step(engine, step, lr=lr, notice=2.0)
        batch = global_batch(step)
        loss = loss_sum(plain, batch) / batch[2].sum()
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf))
        clipped += norm > clip > 0
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert (result.skipped, result.warning, result.notice) == (False, None, 2.0 * world_size())
        assert_weights(engine, plain)
    assert clipped == (0 if clip == 0 else STEPS)
    assert (plain.head.weight - make_toy().head.weight).abs().max() > LR


@pytest.mark.parametrize("size", [1, 2])
def test_equals_plain_adamw(ranks: Any, size: int) -> None:
    ranks.run(check_plain, size, 1, 0.0)
    ranks.run(check_plain, size, 0, 0.05)


def test_a_loose_clip_changes_nothing() -> None:
    one, other = engine_of(clip_grad=0.0), engine_of(clip_grad=1e6)
    for step in range(2):
        run_step(one, step)
        run_step(other, step)
    assert all(torch.equal(w, masters(other)[name]) for name, w in masters(one).items())


def check_bf16() -> None:
    """Gradients come from bf16 weights, updates go into fp32 masters: a loop with both written out."""
    engine = engine_of(precision="bf16", weight_decay=0.1)
    plain, wide = make_toy().bfloat16(), make_toy()
    optimizer = torch.optim.AdamW(decay_groups(wide, 0.1), lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    ranks = world_size()
    for step in range(STEPS):
        result = run_step(engine, step, lr=1e-4)
        count = float(global_batch(step)[2].sum())
        sums, total = [torch.zeros_like(p) for p in wide.parameters()], 0.0
        for rank in range(ranks):
            for batch in micro_batches(step, rank, ranks, 4)[0]:
                loss = loss_sum(plain, batch)
                for target, gradient in zip(sums, torch.autograd.grad(loss / count, plain.parameters()), strict=True):
                    target += gradient.float()
                total += loss.item()
        for parameter, gradient in zip(wide.parameters(), sums, strict=True):
            parameter.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for narrow, parameter in zip(plain.parameters(), wide.parameters(), strict=True):
                narrow.copy_(parameter)
        assert result.loss == pytest.approx(total / count, rel=1e-5)
        assert_weights(engine, wide)
    engine.zero.wait_parameters()
    for name, parameter in engine.module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, masters(engine)[name].bfloat16()), name
    moved = masters(engine)["embed.weight"] - make_toy().embed.weight
    unmoved_in_bf16 = engine.module.embed.weight == make_toy().embed.weight.bfloat16()
    assert (moved[unmoved_in_bf16] != 0).any()  # steps too small for bf16 are not lost


@pytest.mark.parametrize("size", [1, 2])
def test_bf16_trains_fp32_masters(ranks: Any, size: int) -> None:
    ranks.run(check_bf16, size)


def check_settings_agree() -> None:
    """Stage, overlap and buckets change no bit of the weights on the same ranks."""
    results = []
    for settings in [
        {},
        {"zero_stage": 0},
        {"overlap_grad_reduce": False, "overlap_param_gather": False},
        {"ddp_bucket_size": 1},
    ]:
        engine = engine_of(clip_grad=0.5, **settings)
        losses = [run_step(engine, step).loss for step in range(3)]
        results.append((losses, masters(engine)))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-7)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][1][name], rtol=0, atol=1e-7)


def test_settings_that_do_not_change_numbers(ranks: Any) -> None:
    ranks.run(check_settings_agree, 2)


Poison = dict[str, Any]


def poisoned(kind: str, rank: int) -> Any:
    """loss_sum that goes wrong on rank 1 in its second micro-batch."""
    calls = []

    def function(model: nn.Module, batch: Any) -> Tensor:
        calls.append(batch)
        loss = loss_sum(model, batch)
        if rank == 1 and len(calls) == 2:
            if kind == "gradient":
                return loss + (model.layers[0].weight * torch.nan).sum() * 0  # NaN loss too
            if kind == "gradient alone":
                model.norm.weight.register_hook(_once(lambda g: g * torch.inf))
            if kind == "loss":
                return loss + torch.inf
        return loss

    return function


def _once(change: Any) -> Any:
    state = [True]

    def hook(gradient: Tensor) -> Tensor | None:
        if state:
            state.clear()
            return change(gradient)
        return None

    return hook


NAMED = {
    "gradient": "rank 1: gradient of layers.0.weight",
    "gradient alone": "rank 1: gradient of norm.weight",
    "loss": "rank 1: loss inf",
}


def poisoned_step(engine: Any, kind: str, step: int) -> Any:
    group = engine.topology.group("zero")
    batches, count = micro_batches(step, group.rank, group.size, 4)
    return engine.train_step(batches, poisoned(kind, group.rank), count, lr=LR)


def check_skip(stage: int) -> None:
    for kind, named in NAMED.items():
        engine, clean = engine_of(zero_stage=stage), engine_of(zero_stage=stage)
        run_step(engine, 0)
        run_step(clean, 0)
        result = poisoned_step(engine, kind, 1)
        assert result.skipped
        assert named in result.warning and "rank 0" not in result.warning
        assert not math.isfinite(result.loss) or not math.isfinite(result.grad_norm)
        after, wanted = run_step(engine, 2), run_step(clean, 2)  # as if the bad step had not been
        assert (after.loss, after.skipped) == (wanted.loss, False)
        assert all(torch.equal(w, masters(clean)[name]) for name, w in masters(engine).items())


def check_raise() -> None:
    for kind, named in NAMED.items():
        engine = engine_of(non_finite="raise")
        before = masters(engine)
        with pytest.raises(NonFiniteError, match=named) as caught:
            poisoned_step(engine, kind, 1)
        assert "--non-finite skip" in str(caught.value)
        assert all(torch.equal(w, masters(engine)[name]) for name, w in before.items())


def check_ignore() -> None:
    engine = engine_of(non_finite="ignore")
    result = poisoned_step(engine, "gradient", 1)
    assert (result.skipped, result.warning) == (False, None)
    assert masters(engine)["layers.0.weight"].isnan().all()
    engine = engine_of(non_finite="ignore")
    assert poisoned_step(engine, "loss", 1).loss == math.inf  # finite gradients: the step is taken
    assert all(w.isfinite().all() for w in masters(engine).values())


def check_overflow() -> None:
    """Each rank's gradients are finite, their sum is not."""
    engine = engine_of()
    huge = lambda model, batch: model.norm.bias[0] * 2e38  # noqa: E731
    result = engine.train_step([None], huge, 0.5, lr=LR)  # 1 token in all: gradients stay 2e38
    assert result.skipped and "no single rank" in result.warning


def check_non_finite() -> None:
    check_skip(1)
    check_skip(0)
    check_raise()
    check_ignore()
    check_overflow()


def test_non_finite_numbers_name_rank_and_parameter(ranks: Any) -> None:
    ranks.run(check_non_finite, 2)


def test_a_batch_without_tokens_does_nothing_to_the_gradients() -> None:
    engine = engine_of(weight_decay=0.0)
    before = masters(engine)
    tokens, labels, mask = global_batch(0)
    result = engine.train_step([(tokens, labels, mask * 0)], loss_sum, 0.0, lr=LR)
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)
    assert all(torch.equal(w, masters(engine)[name]) for name, w in before.items())


def check_evaluate() -> None:
    """Sums over the ranks, in eval mode, changing nothing; the next step's gradients are its own."""
    engine, group = engine_of(), Topology.build().group("zero")
    modes = []
    engine.module.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = masters(engine)
    batches, count = micro_batches(3, group.rank, group.size, 4)
    total, tokens = engine.evaluate(batches, loss_sum, count)
    batch = global_batch(3)
    assert total == pytest.approx(loss_sum(make_toy(), batch).item(), rel=1e-6)
    assert tokens == float(batch[2].sum())
    assert modes == [False] * 4 and engine.module.training
    assert all(torch.equal(w, masters(engine)[name]) for name, w in before.items())
    assert run_step(engine, 0).loss == run_step(engine_of(), 0).loss


def test_evaluate(ranks: Any) -> None:
    ranks.run(check_evaluate, 2)


def check_pieces() -> None:
    """What is filled through pieces is what every rank trains with after `loaded`."""
    engine, source = engine_of(precision="bf16"), engine_of(precision="bf16")
    for step in range(3):
        run_step(source, step)
    values = masters(source)
    saved = gather_objects(
        [(p.name, p.shape, p.box, p.tensor.clone()) for p in source.pieces(for_save=True)["optimizer"]],
        source.topology.group("world"),
    )
    for name, shape, box, tensor in [piece for pieces in saved for piece in pieces]:
        box.of(values.setdefault(name, torch.full(shape, torch.nan))).copy_(tensor)
    assert set(values) == {f"{n}{s}" for n, _ in make_toy().named_parameters() for s in ("", ".exp_avg", ".exp_avg_sq")}
    engine.optimizer.prepare(["exp_avg", "exp_avg_sq"], source.optimizer.scalars() or {"step": 3.0})
    for section in engine.pieces(for_save=False).values():
        for piece in section:
            piece.tensor.copy_(piece.box.of(values[piece.name]))
    engine.loaded()
    one, other = run_step(engine, 3), run_step(source, 3)
    assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert all(torch.equal(w, masters(source)[name]) for name, w in masters(engine).items())


@pytest.mark.parametrize("size", [1, 2])
def test_state_goes_out_and_in_through_pieces(ranks: Any, size: int) -> None:
    ranks.run(check_pieces, size)


def test_parameters_on_meta_are_drawn_from_the_seed() -> None:
    from tests.models.tiny import LLAMA

    for seed in (5, 6):
        module = GPT(LLAMA, Topology.single())
        specs = {name: p.shard_spec for name, p in module.named_parameters()}
        engine = engine_of(module, seed=seed, precision="bf16")
        for name, weight in masters(engine).items():
            assert torch.equal(weight, initial_values(specs[name], seed))
