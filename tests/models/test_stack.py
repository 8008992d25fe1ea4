"""Blocks with recomputation: which run again, what is kept (measured), how often ranks communicate, compiled blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.config.schema import TransformerConfig
from megazero.models.gpt import GPT, Inputs
from megazero.models.stack import run_blocks
from megazero.ops.dropout import Randomness
from megazero.parallel.random import initial_values
from megazero.parallel.recompute import KEEP_ALL, Recompute
from megazero.parallel.saved_inputs import SavedInputs
from megazero.parallel.topology import Topology
from megazero.zero.zero import Zero
from tests.models.tiny import GPT2, LLAMA, VOCAB
from tests.parallel.live_memory import live_bytes

ROWS, LENGTH = 2, 16
STREAM = ROWS * LENGTH * LLAMA.hidden_size * 4  # bytes of [b, s, h]
SCORES = ROWS * LLAMA.num_attention_heads * LENGTH * LENGTH * 4
FFN = ROWS * LENGTH * (LLAMA.ffn_hidden_size or 0) * 4
FULL = Recompute("full")


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor, context: Any) -> Tensor:
        self.calls += 1
        return x + self.linear(x).tanh()


@pytest.mark.parametrize(
    ("recompute", "calls"),
    [
        (KEEP_ALL, [1, 1, 1, 1, 1]),
        (Recompute("selective", ("mlp",)), [1, 1, 1, 1, 1]),
        (FULL, [2, 2, 2, 2, 2]),
        (replace(FULL, num_layers=2), [2, 2, 2, 2, 2]),
        (replace(FULL, num_layers=9), [2, 2, 2, 2, 2]),
        (replace(FULL, method="block"), [2, 1, 1, 1, 1]),
        (replace(FULL, method="block", num_layers=3), [2, 2, 2, 1, 1]),
        (replace(FULL, method="block", num_layers=9), [2, 2, 2, 2, 2]),
    ],
)
def test_which_blocks_run_again(recompute: Recompute, calls: list[int]) -> None:
    blocks = [Counted() for _ in range(5)]
    x = torch.randn(2, 3, 4, requires_grad=True)
    run_blocks(blocks, x, None, recompute).sum().backward()  # type: ignore[arg-type]
    assert [block.calls for block in blocks] == calls


def model_of(config: TransformerConfig, layers: int, recompute: Recompute, topology: Topology) -> tuple[GPT, Zero]:
    model = GPT(replace(config, num_layers=layers), topology, recompute=recompute)
    zero = Zero(
        model,
        topology,
        stage=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        initial=lambda place: initial_values(place.spec, 1),
        units=[],
    )
    return model, zero


def loss_of(model: GPT) -> Tensor:
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return model(Inputs(tokens, Randomness(1, 0, torch.arange(ROWS))), tokens.roll(-1, 1))


def bytes_of_a_layer(config: TransformerConfig, recompute: Recompute, topology: Topology, layers: int = 1) -> int:
    """What so many layers more keep until backward."""
    more, fewer = (model_of(config, n, recompute, topology)[0] for n in (2 + layers, 2))
    loss_of(more), loss_of(fewer)  # the first time makes buffers
    return live_bytes(lambda: loss_of(more)) - live_bytes(lambda: loss_of(fewer))


def test_what_a_layer_keeps() -> None:
    alone, attention_dropout = Topology.single(), replace(LLAMA, attention_dropout=0.1)

    def kept(recompute: Recompute, config: TransformerConfig = LLAMA, layers: int = 1) -> int:
        return bytes_of_a_layer(config, recompute, alone, layers)

    def parts(*names: str) -> Recompute:
        return Recompute("selective", names)

    everything = kept(KEEP_ALL)
    assert everything > 6 * STREAM
    assert kept(FULL) == STREAM
    assert kept(replace(FULL, num_layers=2), layers=2) == STREAM
    assert kept(replace(FULL, method="block", num_layers=2)) == everything  # the third layer is not among them
    assert kept(replace(FULL, saved=SavedInputs(offload=True))) == STREAM
    assert kept(replace(FULL, saved=SavedInputs(slots=3))) == 0  # they are in buffers, made the first time
    assert everything - kept(parts("layernorm")) == 2 * STREAM
    assert everything - kept(parts("mlp")) >= 2 * FFN
    scale = ROWS * LENGTH * 4  # of the norm, which is inside too
    assert kept(parts("mlp")) - kept(parts("mlp", "layernorm")) == 2 * STREAM + scale
    dropped = kept(KEEP_ALL, attention_dropout) - kept(parts("core_attn"), attention_dropout)
    assert dropped >= 2 * SCORES


def check_what_a_rank_keeps() -> None:
    """On each of two tp ranks."""
    split, together = (Topology.build(tp=2, sequence_parallel=sequence) for sequence in (True, False))
    partition = replace(FULL, saved=SavedInputs(partition=together.group("tp")))
    assert bytes_of_a_layer(LLAMA, FULL, together) == STREAM
    assert bytes_of_a_layer(LLAMA, partition, together) == STREAM // 2
    assert bytes_of_a_layer(LLAMA, FULL, split) == STREAM // 2
    norms = Recompute("selective", ("layernorm",))
    for topology in (split, together):  # with sequence parallelism it is the gathered input that is let go
        saving = bytes_of_a_layer(LLAMA, KEEP_ALL, topology) - bytes_of_a_layer(LLAMA, norms, topology)
        assert saving == 2 * STREAM


def test_what_a_rank_keeps(ranks: Any) -> None:
    ranks.run(check_what_a_rank_keeps, 2)


def backward_calls(recompute: Recompute, topology: Topology, layers: int) -> dict[str, int]:
    """Calls over tp in backward."""
    model, zero = model_of(LLAMA, layers, recompute, topology)
    loss = loss_of(model)
    before = topology.traffic.totals()
    loss.backward()
    spent = {key: count.calls for key, count in topology.traffic.since(before).items()}
    zero.finish_reduction()
    return {name: calls for (axis, name), calls in spent.items() if axis == "tp" and name != "padding"}


def check_communication() -> None:
    """In backward, of 4 layers. Recomputation stops at the last tensor that is needed, before a chunk's last sum."""
    together = Topology.build(tp=2)
    partition = SavedInputs(partition=together.group("tp"))
    plain = backward_calls(KEEP_ALL, together, 4)
    for recompute, sums, gathers in [
        (FULL, 4, 0),  # attention's sum again
        (replace(FULL, num_layers=2), 2 * 3, 0),  # and the first MLP's
        (replace(FULL, saved=partition), 4, 4),  # one gather for each input
        (replace(FULL, num_layers=2, saved=partition), 2 * 3, 2),
        (Recompute("selective", ("core_attn", "layernorm")), 0, 0),
    ]:
        found = backward_calls(recompute, together, 4)
        assert found["all-reduce"] - plain["all-reduce"] == sums
        assert found.get("all-gather", 0) - plain.get("all-gather", 0) == gathers
    split = Topology.build(tp=2, sequence_parallel=True)
    plain = backward_calls(KEEP_ALL, split, 4)
    for recompute, scatters, gathers in [
        (FULL, 4, 2 * 4),
        (Recompute("selective", ("core_attn",)), 0, 0),
        (Recompute("selective", ("mlp",)), 0, 4),
        (Recompute("selective", ("layernorm",)), 0, 2 * 4),
    ]:
        found = backward_calls(recompute, split, 4)
        assert found["reduce-scatter"] - plain["reduce-scatter"] == scatters
        assert found["all-gather"] - plain["all-gather"] == gathers


def test_communication_in_backward(ranks: Any) -> None:
    ranks.run(check_communication, 2)


def gradients(config: TransformerConfig, recompute: Recompute, *, compiled: bool) -> list[Tensor]:
    model, zero = model_of(config, 2, recompute, Topology.single())
    if compiled:
        torch._dynamo.reset()
        for block in model.model.layers.values():
            block.compile(fullgraph=recompute.granularity != "full")
    loss = loss_of(model)
    loss.backward()
    zero.finish_reduction()
    return [loss.detach(), *(bucket.grads.clone() for bucket in zero.buckets)]


@pytest.mark.parametrize("recompute", [FULL, Recompute("selective", ("core_attn", "mlp"))], ids=["full", "selective"])
def test_compiled_blocks(recompute: Recompute) -> None:
    for one, other in zip(
        gradients(GPT2, recompute, compiled=True), gradients(GPT2, KEEP_ALL, compiled=False), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
