"""What only a GPU can show: ops and a training step on CUDA against the CPU, bf16, a checkpoint from one to the other.

Run by `make gpu-check`; everything else is the same code and is tested on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megazero.engine.checkpoint import load, save
from megazero.engine.engine import Engine
from megazero.ops.activation import swiglu, swiglu_reference
from megazero.ops.attention import attention, attention_reference, document_mask
from megazero.ops.dropout import dropout
from megazero.ops.norm import rms_norm, rms_norm_reference
from megazero.ops.rope import apply_rope, apply_rope_reference, rope_frequencies, rope_table
from megazero.parallel.recompute import checkpoint
from megazero.parallel.saved_inputs import SavedInputs
from megazero.parallel.topology import Topology
from megazero.train.build import Forward, build_engine
from tests.parity.measure import Layout, configure, local_batches

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(CUDA).requires_grad_()


OPS: dict[str, tuple[Any, Any, tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm_reference(x, w, 1e-5),
        ((4, 8, 64), (64,)),
    ),
    "swiglu": (swiglu, swiglu_reference, ((4, 64), (4, 64))),
    "attention": (attention, attention_reference, ((2, 16, 4, 32), (2, 16, 2, 32), (2, 16, 2, 32))),
}


@pytest.mark.parametrize("op", OPS)
def test_op_equals_its_reference(op: str) -> None:
    ours, reference, shapes = OPS[op]
    inputs = [normal(*shape) for shape in shapes]
    found, wanted = ours(*inputs), reference(*inputs)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    weight = torch.linspace(-1, 1, found.numel(), device=CUDA).view_as(found)
    for a, b in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(wanted, inputs, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)


def test_rope_and_document_mask() -> None:
    x = normal(2, 16, 4, 32)
    table = rope_table(torch.arange(16, device=CUDA).unsqueeze(0), rope_frequencies(32, 1e4).to(CUDA))
    torch.testing.assert_close(apply_rope(x, table), apply_rope_reference(x, table))
    documents = torch.tensor([[0] * 6 + [1] * 10, [0] * 16], device=CUDA)
    q, k, v = normal(2, 16, 4, 32), normal(2, 16, 2, 32), normal(2, 16, 2, 32)
    mask = document_mask(documents)
    torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k, v, mask), rtol=2e-3, atol=2e-3)


def test_dropout_drops_the_same_elements_as_on_the_cpu() -> None:
    rows, columns = torch.arange(64).view(-1, 1), torch.arange(128).view(1, -1)
    x = torch.ones(64, 128)
    assert torch.equal(dropout(x.to(CUDA), 0.3, 7, [rows, columns]).cpu(), dropout(x, 0.3, 7, [rows, columns]))


def test_training_equals_the_cpu_in_fp32() -> None:
    here, there = train(CUDA, "fp32"), train(torch.device("cpu"), "fp32")
    assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("slots", [0, 4])
def test_offloaded_inputs_leave_the_gpu_and_come_back(slots: int) -> None:
    layer, saved = torch.nn.Linear(512, 512, device=CUDA), SavedInputs(offload=True, slots=slots)

    def run(call: Any) -> tuple[int, list[Tensor]]:
        x = normal(1024, 512).detach().requires_grad_()
        before, y = torch.cuda.memory_allocated(), x
        for _ in range(8):
            y = call(lambda z: torch.relu(layer(z)) + z, y)
        kept = torch.cuda.memory_allocated() - before
        layer.zero_grad()
        y.square().sum().backward()
        return kept, [y.detach(), x.grad, layer.weight.grad.clone()]

    run(checkpoint)  # cuBLAS takes its workspace
    for _ in range(2):  # slots are used again
        alone, offloaded = run(checkpoint), run(lambda function, x: checkpoint(function, x, saved=saved))
        assert all(torch.equal(a, b) for a, b in zip(alone[1], offloaded[1], strict=True))
        size = 1024 * 512 * 4
        assert (alone[0], offloaded[0]) == (8 * size, size)  # of its inputs, the first is the caller's; and the output
    kept = saved.keep(normal(4, 4))
    assert kept.place.is_pinned() and kept.device.type == "cuda"


def test_bf16_learns_and_keeps_fp32_masters() -> None:
    losses = train(CUDA, "bf16")
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(CUDA, "fp32"), rel=2e-2)


def test_checkpoint_from_gpu_to_cpu(tmp_path: Path) -> None:
    engine = build(CUDA, "bf16")
    step(engine, Forward(configure(Layout(), 1, {}), engine.topology, CUDA), 0)
    save(tmp_path, 1, engine.pieces(for_save=True), {"states": engine.optimizer.state_keys()}, "", world(engine))
    other = build(torch.device("cpu"), "fp32")
    other.optimizer.prepare(engine.optimizer.state_keys(), engine.optimizer.scalars())
    load(tmp_path, None, other.pieces(for_save=False), world(other))
    for a, b in zip(engine.zero.buckets, other.zero.buckets, strict=True):
        assert torch.equal(a.master.cpu(), b.master)


def world(engine: Engine) -> Any:
    return engine.topology.group("world")


def build(device: torch.device, precision: str) -> Engine:
    return build_engine(configure(Layout(), 1, {"training.precision": precision}), Topology.single(), device)[0]


def step(engine: Engine, forward: Forward, number: int) -> float:
    batches = [batch.to(engine.device) for batch in local_batches(Layout(), engine.topology, number % 2, packed=False)]
    count = float(sum(batch.loss_mask.sum() for batch in batches))
    return engine.train_step(batches, forward.loss_sum, count, lr=1e-3).loss


def train(device: torch.device, precision: str) -> list[float]:
    config = configure(Layout(), 1, {"training.precision": precision})
    engine, forward = build_engine(config, Topology.single(), device)
    return [step(engine, forward, number) for number in range(6)]
