"""The ladder: its rows are the formulas' bytes, its order follows the seconds, and each rung changes what it says."""

from __future__ import annotations

from typing import Any

import pytest

from megazero.config.schema import RunConfig
from megazero.plan import cost, planner
from megazero.plan.cost import step_seconds
from megazero.plan.cut import cut_layers
from megazero.plan.ladder import CHOICES, Machines, Row, gentler, recommended, rows, walk
from megazero.plan.memory import Homes
from megazero.plan.model_size import model_size
from megazero.plan.parameters import parameters
from tests.plan.measure import configuration

GIB = 2**30
LARGE: dict[str, Any] = {
    "model__num_layers": 32,
    "model__hidden_size": 4096,
    "model__num_attention_heads": 32,
    "model__num_query_groups": 8,
    "model__vocab_size": 32000,
    "data__seq_length": 4096,
    "training__micro_batch_size": 4,
    "training__gradient_accumulation_steps": 1,
}


def large(world: int = 8, **changes: Any) -> RunConfig:
    return configuration(world, **(LARGE | changes))


def machines(world: int = 8, device: float = 80, cpu: float | None = None) -> Machines:
    return Machines(world, min(world, 8), int(device * GIB), None if cpu is None else int(cpu * GIB))


def by_choice(found: tuple[Row, ...]) -> dict[tuple[int, str, str], Row]:
    return {row.choice: row for row in found}


def test_bytes_of_every_choice_with_16_bit_gradients() -> None:
    """The seeds' 16Ψ, 4Ψ + 12Ψ/N, 2Ψ + 14Ψ/N, 16Ψ/N, and what offload leaves on the device."""
    config, group = large(parallel__grad_accum_dtype="model"), 8
    psi = sum(parameter.elements for parameter in parameters(config, cut_layers(config)))
    found = by_choice(rows(config, machines()))
    assert found.keys() == set(CHOICES)

    def kept(choice: tuple[int, str, str], home: str) -> float:
        names = ("weights", "gradients", "master weights", "optimizer state")
        components = getattr(found[choice].homes, home)
        return sum(components.get(name, 0.0) for name in names) / psi

    none = "none"
    for stage, each in enumerate((16, 4 + 12 / group, 2 + 14 / group, 16 / group)):
        assert kept((stage, none, none), "device") == pytest.approx(each)
    for choice, device, cpu, nvme in [
        ((1, "cpu", none), 4, 12 / group, 0),
        ((2, "cpu", none), 2, 14 / group, 0),
        ((3, "cpu", none), 2 / group, 14 / group, 0),
        ((3, "cpu", "cpu"), 0, 16 / group, 0),
        ((3, "nvme", none), 2 / group, 2 / group, 12 / group),
        ((3, "nvme", "cpu"), 0, 4 / group, 12 / group),
    ]:
        homes = [kept(choice, home) for home in ("device", "cpu", "nvme")]
        assert homes == pytest.approx([device, cpu, nvme]), choice
    files = {"offload__offload_param": "nvme", "offload__offload_param_path": "x", "offload__offload_max_in_cpu": 0}
    beyond = by_choice(rows(large(parallel__zero_stage=3, **files), machines()))
    assert beyond[3, "nvme", "nvme"].homes.nvme["weights"] == pytest.approx(2 * psi / group)
    assert found[3, "cpu", "cpu"].cpu == 8 * sum(found[3, "cpu", "cpu"].homes.cpu.values())


def test_a_choice_of_its_own_gets_a_row() -> None:
    config = large(parallel__zero_stage=3, offload__offload_param="cpu")
    assert rows(config, machines())[-1].choice == (3, "none", "cpu")


def test_elements_that_are_known_better() -> None:
    assert rows(large(), machines(), 10**9)[0].homes.device["weights"] == 2e9


@pytest.mark.parametrize(
    ("device", "cpu", "choice", "changes"),
    [
        (400, None, (2, "none", "none"), ""),  # no dearer than ZeRO 1, and smaller
        (80, None, (3, "none", "none"), ""),
        (35, None, (2, "none", "none"), "activation checkpointing"),
        (25, None, (3, "none", "none"), "activation checkpointing"),
        (15, 1024, (3, "cpu", "none"), "activation checkpointing"),
        (15, 50, (3, "nvme", "none"), "activation checkpointing"),
    ],
)
def test_the_fastest_that_fits(device: float, cpu: float | None, choice: tuple[int, str, str], changes: str) -> None:
    rungs = list(walk(large(), machines(device=device, cpu=cpu)))
    found = recommended(rungs)
    assert found is not None
    rung, row = found
    assert (row.choice, rung.changes) == (choice, changes)
    assert row.fits
    same = [other for each in rungs[:2] for other in each.rows if other.fits]
    assert row.seconds.total <= min(other.seconds.total for other in same) * 1.05


@pytest.mark.parametrize(("size", "stage"), [("7B", 2), ("70B", 3)])
def test_a_large_cluster_offloads_nothing(size: str, stage: int) -> None:
    """A shard is so small there that offload costs next to nothing, and saves next to nothing."""
    asked = planner._parser().parse_args(["--model", size, "--world-size", "1024"])
    many = Machines(1024, 8, int(141e9))
    config, count = planner.configuration(model_size(size), None, asked, many)
    found = recommended(list(walk(config, many, count)))
    assert found is not None
    assert (found[1].choice, found[0].changes) == ((stage, "none", "none"), "")


@pytest.mark.parametrize("world", [1, 8, 64, 1024])
@pytest.mark.parametrize("device", [20, 40, 80, 400])
def test_of_nearly_equal_rows_the_one_that_offloads_least(world: int, device: float) -> None:
    for rung in walk(large(world), machines(world, device)):
        best = rung.fastest
        if best is None:
            continue
        roomy = [row for row in rung.rows if row.fits and row.is_tight == best.is_tight]
        least = min(row.seconds.moving for row in roomy)
        near = [row for row in roomy if row.seconds.moving <= 1.03 * least]
        assert best in near
        assert best.cpu + best.nvme == min(row.cpu + row.nvme for row in near)


def test_room_is_left_where_that_is_possible() -> None:
    """At 84 GiB ZeRO 2 would fit just so, at 65 only what fits just so is left."""
    for device, stage in ((84, 3), (90, 2)):
        found = recommended([next(walk(large(), machines(device=device)))])
        assert found is not None
        assert (found[1].choice, found[1].is_tight) == ((stage, "none", "none"), False)
    found = recommended([next(walk(large(), machines(device=65)))])
    assert found is not None and found[1].is_tight


def test_smaller_portions_come_last() -> None:
    rungs = list(walk(large(), machines(device=8)))
    full = "activation checkpointing, micro-batch size 1"
    assert [rung.changes for rung in rungs] == [
        "",
        "activation checkpointing",
        "activation checkpointing, micro-batch size 2",
        full,
        f"{full}, sequences of 2,048",
        f"{full}, sequences of 1,024",
        f"{full}, sequences of 512",
    ]
    assert rungs[3].rows[0].config.training.gradient_accumulation_steps == 4  # as many samples as before
    found = recommended(rungs)
    assert found is not None
    assert found[0].changes == "activation checkpointing, micro-batch size 2"
    assert recommended(list(walk(large(), machines(device=2)))) is None


def test_a_smaller_micro_batch_is_named_when_it_saves_offload() -> None:
    rungs = list(walk(large(), machines(device=20.5, cpu=1024)))
    found = recommended(rungs)
    assert found is not None
    assert (found[1].choice, found[0].changes) == ((3, "cpu", "none"), "activation checkpointing")
    other = gentler(rungs, found)
    assert other is not None
    assert (other[1].choice, other[0].changes[-12:]) == ((3, "none", "none"), "batch size 2")
    assert gentler(rungs[:2], found) is None


def seconds(config: RunConfig, world: int = 8, machine: int = 8, homes: Homes | None = None) -> cost.Seconds:
    cut = cut_layers(config)
    return step_seconds(config, cut, parameters(config, cut), homes or Homes(), world, machine)


def test_seconds_are_bytes_over_rates() -> None:
    config = large(parallel__zero_stage=2)
    psi = sum(parameter.elements for parameter in parameters(config, cut_layers(config)))
    network = (4 + 2) * psi * 7 / 8
    assert seconds(config).network == pytest.approx(network / cost.NVLINK)
    assert seconds(config, machine=4).network == pytest.approx(network / cost.NETWORK)
    assert seconds(config).moving == seconds(config).network
    away = large(parallel__zero_stage=2, offload__offload_optimizer="cpu", training__gradient_accumulation_steps=3)
    assert seconds(away).pcie == pytest.approx((3 * 4 + 2) * psi / 8 / cost.PCIE)  # gradients of each micro-batch
    assert seconds(away).cpu == pytest.approx((24 + 4 + 2) * psi / cost.CPU_MEMORY)  # of 8 ranks together
    nvme = large(parallel__zero_stage=2, offload__offload_optimizer="nvme", offload__offload_optimizer_path="x")
    assert seconds(nvme).nvme == pytest.approx(24 * psi / cost.NVME)
    homes = Homes(nvme={"weights": 7e9})
    both = large(parallel__zero_stage=3, offload__offload_param="nvme", offload__offload_param_path="x")
    assert seconds(both, machine=1, homes=homes).nvme == pytest.approx(3.0)
    assert seconds(both).pcie == pytest.approx(2 * 2 * psi / 8 / cost.PCIE)


def test_the_published_order_of_speed() -> None:
    """Later stages are slower, offload slower still, NVMe slowest (the order of the published benchmarks)."""
    found = by_choice(rows(large(training__gradient_accumulation_steps=4), machines()))
    order = [(1, "none", "none"), (2, "none", "none"), (3, "none", "none"), (3, "cpu", "none"), (3, "nvme", "nvme")]
    times = [found[choice].seconds.total for choice in order]
    assert times == sorted(times) and len(set(times)) == len(times)


def test_recomputation_costs_a_forward() -> None:
    full = seconds(large(recompute__recompute_granularity="full"))
    assert full.moving == seconds(large()).moving
    assert full.total - full.moving == full.again > 0
