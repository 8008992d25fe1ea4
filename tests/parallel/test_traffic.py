"""The counter of communication held to DESIGN.md's formulas, and to a second count made at torch.distributed itself."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megazero.models.gpt import GPT
from megazero.parallel.topology import Topology
from megazero.parallel.traffic import Count, Counts, Traffic, by_axis
from tests.harness import ROOT, Ranks
from tests.parity.measure import BATCH, MODEL, SEQUENCE, STEPS, Layout, configure, train

FP32, BF16 = 4, 2
HIDDEN, LAYERS = MODEL["hidden_size"], MODEL["num_layers"]
STREAM = SEQUENCE * HIDDEN  # elements of one sample's residual stream


@contextmanager
def topologies() -> Iterator[list[Topology]]:
    """The topologies that are built meanwhile."""
    built: list[Topology] = []
    build = Topology.build

    def kept(*arguments: Any, **keywords: Any) -> Topology:
        built.append(build(*arguments, **keywords))
        return built[-1]

    with mock.patch.object(Topology, "build", kept):
        yield built


def counted(layout: Layout, settings: dict[str, Any]) -> Counts:
    """What training on the layout for STEPS steps counted on this rank."""
    with topologies() as built:
        train(layout, settings)
    return built[0].traffic.totals()


# ---- the second count: every function of torch.distributed that sends, watched

SENT: dict[str, Callable[..., tuple[Any, float]]] = {  # name -> (tensor or list, times its bytes) by world size
    "all_reduce": lambda n, tensor, *_, **__: (tensor, 2 * (n - 1) / n),
    "all_gather": lambda n, parts, tensor, *_, **__: (tensor, n - 1),
    "all_to_all_single": lambda n, received, sent, *_, **__: (sent, (n - 1) / n),
    "broadcast": lambda n, tensor, *_, **__: (tensor, (n - 1) / n),
    "isend": lambda n, tensor, *_, **__: (tensor, 1),
    "send": lambda n, tensor, *_, **__: (tensor, 1),
}
UNEXPECTED = (
    *("all_gather_into_tensor", "reduce_scatter_tensor", "reduce_scatter", "all_to_all", "reduce", "gather"),
    *("scatter", "all_reduce_coalesced", "all_gather_coalesced"),
)  # not on gloo: a call fails the test


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Bytes by process group's name that go through torch.distributed, whoever calls it."""
    found: Counter[str] = Counter()

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            group = keywords.get("group") or dist.group.WORLD
            tensor, times = SENT[name](dist.get_world_size(group), *arguments, **keywords)
            if name in ("send", "isend") and tensor.numel() == 1:  # stages greet each other once, at the start
                return original(*arguments, **keywords)
            found[group.group_name] += tensor.numel() * tensor.element_size() * times
            return original(*arguments, **keywords)

        return call

    watching = {name: watch(name, getattr(dist, name)) for name in SENT}
    with (
        mock.patch.multiple(dist, **watching),
        # Batches hold isend itself, and compare it with that of the module which defines it.
        mock.patch.object(c10d, "isend", watching["isend"]),
        mock.patch.multiple(dist, **dict.fromkeys(UNEXPECTED, mock.Mock(side_effect=AssertionError))),
    ):
        yield found


def both_counts(layout: Layout) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes by process group as the counter has them, and as they were handed to torch.distributed. Axes of the same
    ranks can share a process group."""
    with topologies() as built, watched() as other:
        train(layout)
    topology = built[0]
    own: Counter[str] = Counter()
    for (axis, _), count in topology.traffic.totals().items():
        own[topology.group(axis).handle.group_name] += count.bytes  # type: ignore[assignment,union-attr]
    for handle in topology._subgroups.values():  # kv heads on several tp ranks: counted under tp
        other[topology.group("tp").handle.group_name] += other.pop(handle.group_name, 0)  # type: ignore[union-attr]
    return dict(own), dict(other)


EVERYWHERE = {
    "dp2 zero0": Layout(dp=2, zero=0),
    "dp4": Layout(dp=4, micro_batch=1),
    "tp2 dp2": Layout(tp=2, dp=2),
    "tp4": Layout(tp=4),  # with pairs of ranks that hold the same heads
    "tp2 dp2 sequence": Layout(tp=2, dp=2, sequence=True),
    "cp2 p2p": Layout(cp=2),
    "cp4 a2a": Layout(cp=4, cp_comm="a2a"),
    "pp2 1f1b dp2": Layout(pp=2, schedule="1f1b", dp=2),
    "pp4 gpipe": Layout(pp=4, schedule="gpipe"),
    "pp2 interleaved": Layout(pp=2, schedule="interleaved-1f1b", virtual=2),
    "pp2 zbv": Layout(pp=2, schedule="zbv"),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_nothing_escapes_the_counter(ranks: Ranks, name: str) -> None:
    for own, other in ranks.run(both_counts, EVERYWHERE[name].world_size, EVERYWHERE[name]):
        assert own == other
        assert own


def test_only_the_collectives_communicate() -> None:
    calls = {*SENT, *UNEXPECTED, "batch_isend_irecv"}
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megazero").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in calls and ast.unparse(node.value) == "dist"
    }
    assert found == {"megazero/parallel/collectives.py", "megazero/parallel/exchange.py"}


# ---- ZeRO: 2Ψ elements × (N-1)/N in stages 0 and 1, however many micro-batches


def parameters() -> int:
    config = configure(Layout(), 1, {})
    return sum(parameter.numel() for parameter in GPT(config.model, Topology.single()).parameters())


@pytest.mark.parametrize(("stage", "dp", "micro_batch"), [(0, 2, 4), (0, 4, 1), (1, 2, 2), (1, 4, 1), (1, 4, 2)])
def test_zero_moves_two_psi(ranks: Ranks, stage: int, dp: int, micro_batch: int) -> None:
    volume = parameters() * FP32 * (dp - 1) / dp * STEPS
    for counts in ranks.run(counted, dp, Layout(dp=dp, zero=stage, micro_batch=micro_batch), {}):
        assert counts["zero", "reduce-scatter"].bytes == volume
        assert counts["zero", "all-gather"].bytes == volume
        assert counts["zero", "reduce-scatter"].calls == counts["zero", "all-gather"].calls
        assert 0 < counts["zero", "padding"].bytes < 2 * 64 * dp * FP32 * counts["zero", "all-gather"].calls
        assert counts["zero", "scalars"] == Count(STEPS, STEPS * 8 * 2 * (dp - 1) / dp)  # tokens in the batch
        # norm, loss, unused, notice
        assert counts["world", "scalars"] == Count(
            STEPS, STEPS * 4 * 8 * 2 * (dp - 1) / dp
        )  # norm, loss, unused, notice
        assert len(counts) == 5


def test_types_travel_as_they_are(ranks: Ranks) -> None:
    settings = {"training.precision": "bf16", "parallel.grad_reduce_in_bf16": True}
    volume = parameters() * BF16 / 2 * STEPS
    for counts in ranks.run(counted, 2, Layout(dp=2), settings):
        assert counts["zero", "reduce-scatter"].bytes == counts["zero", "all-gather"].bytes == volume
    for counts in ranks.run(counted, 2, Layout(dp=2), {"training.precision": "bf16"}):
        assert counts["zero", "reduce-scatter"].bytes == 2 * counts["zero", "all-gather"].bytes == 2 * volume


# ---- tp: a block has two all-reduces forward and two backward; embedding and output have one each


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_tensor_parallelism(ranks: Ranks, tp: int, micro_batch: int) -> None:
    micro_batches = BATCH // micro_batch
    calls = STEPS * micro_batches * (4 * LAYERS + 2)
    settings = {"model.num_query_groups": MODEL["num_attention_heads"]}  # no heads on several ranks
    for counts in ranks.run(counted, tp, Layout(tp=tp, micro_batch=micro_batch), settings):
        sent = calls * micro_batch * STREAM * FP32 * 2 * (tp - 1) / tp
        assert counts["tp", "all-reduce"] == Count(calls, sent)
        assert counts["tp", "all-gather"] == loss_numbers(micro_batches, micro_batch, tp)
        assert {axis for axis, _ in counts} == {"tp", "world"}


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallelism_moves_the_same_volume(ranks: Ranks, tp: int) -> None:
    micro_batch, micro_batches = 2, BATCH // 2
    calls = STEPS * micro_batches * (4 * LAYERS + 2)
    half = Count(calls, calls * micro_batch * STREAM * FP32 * (tp - 1) / tp)  # of the all-reduces without it
    settings = {"model.num_query_groups": MODEL["num_attention_heads"]}
    for counts in ranks.run(counted, tp, Layout(tp=tp, micro_batch=micro_batch, sequence=True), settings):
        assert counts["tp", "reduce-scatter"] == half
        assert counts["tp", "all-gather"] == half + loss_numbers(micro_batches, micro_batch, tp)
        norms = (2 * LAYERS + 1) * HIDDEN  # each rank's gradients come from its part of the sequence
        least = STEPS * norms * FP32 * 2 * (tp - 1) / tp
        assert least <= counts["tp", "all-reduce"].bytes < least * 2  # with their buckets' padding


def loss_numbers(micro_batches: int, micro_batch: int, tp: int) -> Count:
    """Three fp32 numbers for each token, gathered: maximum, sum and target of each rank's part of the vocabulary."""
    calls = STEPS * micro_batches
    return Count(calls, calls * 3 * micro_batch * SEQUENCE * FP32 * (tp - 1))


# ---- pp: each micro-batch's hidden state, and its gradient, crosses each border between ranks once


@pytest.mark.parametrize(
    ("schedule", "virtual", "borders"),  # that a rank sends over, forward and backward together
    [("gpipe", None, 1), ("1f1b", None, 1), ("interleaved-1f1b", 2, 3), ("zbv", None, 2), ("dualpipev", None, 2)],
)
def test_pipelines(ranks: Ranks, schedule: str, virtual: int | None, borders: int) -> None:
    layout = Layout(pp=2, schedule=schedule, virtual=virtual)
    calls = STEPS * BATCH // layout.micro_batch * borders
    for counts in ranks.run(counted, 2, layout, {}):
        assert counts["pp", "send"] == Count(calls, calls * layout.micro_batch * STREAM * FP32)


# ---- cp: a rank holds s/cp tokens of a sequence; of the heads, `share` are keys' and values'


@pytest.mark.parametrize(("cp", "groups"), [(2, 8), (4, 8), (2, 2)])
def test_ring_attention(ranks: Ranks, cp: int, groups: int) -> None:
    """Keys and values go round but for the last step, in forward and in backward; their gradients go all the way."""
    share = groups / MODEL["num_attention_heads"]
    volume = STEPS * LAYERS * BATCH * STREAM * FP32 * share / cp * 2 * (2 * (cp - 1) + cp)
    for counts in ranks.run(counted, cp, Layout(cp=cp), {"model.num_query_groups": groups}):
        assert counts["cp", "send"].bytes == volume


@pytest.mark.parametrize(("cp", "groups"), [(2, 8), (4, 8), (4, 2)])
def test_ulysses_attention(ranks: Ranks, cp: int, groups: int) -> None:
    """All-to-alls of q, k, v and the result, and of their gradients; every rank needs one key/value head at least."""
    share = max(groups, cp) / MODEL["num_attention_heads"]
    volume = STEPS * LAYERS * BATCH * STREAM * FP32 / cp * (cp - 1) / cp * (4 + 4 * share)
    for counts in ranks.run(counted, cp, Layout(cp=cp, cp_comm="a2a"), {"model.num_query_groups": groups}):
        assert counts["cp", "all-to-all"].bytes == volume


# ---- the counter itself


def test_wire_bytes_by_hand() -> None:
    traffic = Traffic()
    traffic.add("tp", "all-reduce", 4, elements=100, itemsize=4)
    traffic.add("tp", "all-reduce", 4, elements=20, itemsize=2)
    traffic.add("zero", "all-gather", 4, elements=128, itemsize=2, padding=28)
    traffic.add("world", "all-reduce", 2, elements=3, itemsize=8)
    traffic.add("pp", "send", 4, elements=50, itemsize=2)
    assert traffic.totals() == {
        ("tp", "all-reduce"): Count(2, 600.0 + 60.0),
        ("zero", "all-gather"): Count(1, 150.0),
        ("zero", "padding"): Count(0, 42.0),
        ("world", "scalars"): Count(1, 24.0),
        ("pp", "send"): Count(1, 100.0),
    }


def test_since_is_what_came_on_top() -> None:
    traffic = Traffic()
    traffic.add("tp", "all-reduce", 2, elements=100, itemsize=4)
    traffic.add("pp", "send", 2, elements=100, itemsize=4)
    before = traffic.totals()
    traffic.add("tp", "all-reduce", 2, elements=10, itemsize=4)
    assert before["tp", "all-reduce"] == Count(1, 400.0)
    assert traffic.since(before) == {("tp", "all-reduce"): Count(1, 40.0)}


def test_records_have_whole_numbers_by_axis() -> None:
    counts = {("zero", "padding"): Count(0, 10.4), ("tp", "all-reduce"): Count(2, 10.6), ("tp", "send"): Count(1, 3.0)}
    sent, calls = by_axis(counts)
    assert sent == {"tp": {"all-reduce": 11, "send": 3}, "zero": {"padding": 10}}
    assert calls == {"tp": {"all-reduce": 2, "send": 1}}


def test_groups_count_into_their_topology(ranks: Ranks) -> None:
    assert ranks.run(groups_share, 4) == [True] * 4


def groups_share() -> bool:
    topology = Topology.build(tp=4)
    groups = [*topology.groups, *(topology.subgroup("tp", size) for size in (1, 2, 4))]
    return all(group.traffic is topology.traffic for group in groups)
