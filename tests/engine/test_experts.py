"""Experts spread over ranks by initialize(): the numbers of one process, at every stage."""

from __future__ import annotations

from typing import Any

import pytest

from megazero.parallel.topology import Topology
from tests.engine.moe import assert_alike, config_of, engine_of, plain, spread, train
from tests.harness import Ranks


def check_parity(ep: int, stage: int, accumulation: int, clip: float, built: bool, settings: dict[str, Any]) -> None:
    topology = Topology.build()
    moe = {} if built else {"moe": {"enabled": True, "ep_size": ep}}
    model = spread(ep, topology.rank, built, **settings)
    engine = engine_of(model, config_of(stage, accumulation, clip, **moe))
    assert engine.topology.size("ep") == ep == engine.settings.parallel.expert_model_parallel_size
    found = train(engine)
    assert_alike(found, plain(topology.world_size, accumulation, clip, **settings))


LAYOUTS = [
    # ranks, ep, stage, micro-batches, clip, the layer says it (or the configuration)
    (2, 2, 0, 1, 0.0, True),
    (2, 2, 1, 2, 0.5, False),
    (2, 2, 2, 1, 0.5, True),
    (2, 2, 3, 2, 0.0, False),
    (4, 1, 2, 1, 0.5, True),
    (4, 2, 0, 2, 0.5, False),
    (4, 2, 1, 1, 0.5, True),
    (4, 2, 2, 2, 0.5, False),
    (4, 2, 3, 2, 0.5, True),
    (4, 4, 0, 1, 0.5, True),
    (4, 4, 1, 2, 0.0, True),
    (4, 4, 2, 2, 0.5, False),
    (4, 4, 3, 1, 0.5, True),
]


@pytest.mark.parametrize(("size", "ep", "stage", "accumulation", "clip", "built"), LAYOUTS)
def test_equals_one_process(
    ranks: Ranks, size: int, ep: int, stage: int, accumulation: int, clip: float, built: bool
) -> None:
    ranks.run(check_parity, size, ep, stage, accumulation, clip, built, {})
