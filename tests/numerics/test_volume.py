"""What each rank hands to torch.distributed in a step is DESIGN.md's table, by our counter and by an independent one.

    elements × (N-1)/N    stage 0: 2Ψ    stage 1: 2Ψ    stage 2: (g+1)Ψ    stage 3: 3gΨ        g micro-batches

Stage 3 gathers for backward what backward reads. A linear layer's backward reads its weight (to give its input a
gradient) and an embedding's does not: 3gΨ for linear layers alone, 3gΨ - gE with an embedding of E elements.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import megazero
from megazero.engine.engine import Engine
from megazero.parallel.traffic import PADDING, SCALARS, Counts
from tests.harness import Ranks
from tests.numerics.table import Record, record_line
from tests.numerics.wire import Seen, watched

WIDTH, WORDS, LAYERS = 33, 50, 4
TITLE = "elements on the wire of each rank in a step, in units of Ψ(N-1)/N; padding and numbers apart"


class Linears(nn.Module):
    """Layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=layer % 2 == 0) for layer in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:  # (b, h)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().mean()


class Embedded(Linears):
    """The same behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:  # (b,)
        return super().forward(self.embed(ids))


MODELS: dict[str, type[Linears]] = {"linear": Linears, "embedding": Embedded}


def inputs(kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "embedding":
        return torch.arange(6)
    return torch.linspace(-1, 1, 6 * WIDTH, dtype=dtype).view(6, WIDTH).requires_grad_()


def engine_of(kind: str, stage: int, accumulation: int, precision: str = "fp32") -> Engine:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_max_reuse_distance": 0},
        "bf16": {"enabled": precision == "bf16"},
    }
    return megazero.initialize(model=MODELS[kind](), config=config)[0]


def one_step(kind: str, stage: int, accumulation: int, precision: str = "fp32") -> tuple[int, int, Counts, Seen]:
    """The second step: (elements of the model, of the padding of all buckets, our counts, the independent one)."""
    engine = engine_of(kind, stage, accumulation, precision)
    x = inputs(kind, engine.precision.dtype)

    def step() -> None:
        for _ in range(accumulation):
            engine.backward(engine(x))
            engine.step()
        engine.zero.wait_parameters()

    step()
    before = engine.topology.traffic.totals()
    with watched() as seen:
        step()
    counts = engine.topology.traffic.since(before)
    elements = sum(p.numel() for p in engine.module.parameters())
    return elements, sum(bucket.padding for bucket in engine.zero.buckets), counts, seen


def times(stage: int, g: int) -> int:
    """DESIGN.md's table: how often Ψ goes."""
    return {0: 2, 1: 2, 2: g + 1, 3: 3 * g}[stage]


@pytest.mark.parametrize(("size", "kind"), list(itertools.product((2, 4), MODELS)))
def test_the_table(ranks: Ranks, size: int, kind: str, record_property: Record) -> None:
    for stage, g in itertools.product(range(4), (1, 4)):
        for psi, padding, counts, seen in ranks.run(one_step, size, kind, stage, g):
            spared = g * WORDS * WIDTH if kind == "embedding" and stage == 3 else 0
            share = (size - 1) / size
            wanted = (times(stage, g) * psi - spared) * share
            ours = {name: count.bytes / 4 for (_, name), count in counts.items()}
            parts = sum(count for name, count in ours.items() if name not in (PADDING, SCALARS))
            assert parts == pytest.approx(wanted, abs=1e-6), (stage, g, ours)
            assert ours[PADDING] > 0
            if not spared:  # the embedding's own bucket has padding too
                assert ours[PADDING] == pytest.approx(times(stage, g) * padding * share, abs=1e-6), (stage, g, ours)
            # independent: everything that was handed over, padding and all
            assert seen.tensors / 4 == pytest.approx(parts + ours[PADDING], abs=1e-6), (stage, g, ours)
            assert seen.scalars == pytest.approx(sum(c.bytes for (_, name), c in counts.items() if name == SCALARS))
            assert seen.calls == sum(count.calls for count in counts.values())
        record_line(
            record_property,
            TITLE,
            f"{kind:9} N={size} g={g} stage {stage}: {parts / psi / share:6.3f}, table {times(stage, g)}"
            + (f" - {spared / psi:.3f}" if spared else "")
            + f"; padding {ours[PADDING] / psi / share:.3f}",
        )


def one_16_bit_step(stage: int) -> dict[str, float]:
    psi, _, counts, _ = one_step("linear", stage, 2, "bf16")
    return {name: count.bytes / psi for (_, name), count in counts.items() if name not in (PADDING, SCALARS)}


def test_each_in_its_own_type(ranks: Ranks) -> None:
    """16-bit weights: they are gathered in 2 bytes, gradients reduced in 4 (over 2 ranks half of it goes)."""
    found = {stage: ranks.run(one_16_bit_step, 2, stage)[0] for stage in (1, 2, 3)}
    assert found[1] == pytest.approx({"reduce-scatter": 2.0, "all-gather": 1.0})
    assert found[2] == pytest.approx({"reduce-scatter": 4.0, "all-gather": 1.0})
    assert found[3] == pytest.approx({"reduce-scatter": 4.0, "all-gather": 4.0})
