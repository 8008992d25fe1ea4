"""How far a run may be from plain torch, and which runs must have one set of bits.

One order of summation: of the micro-batches on each rank and then over ranks (stages 0 and 1), or over the ranks of
each micro-batch and then of these (2 and 3). With one micro-batch both are the same. Where state lives changes no
number.
"""

from __future__ import annotations

import math

import torch

from tests.numerics.setting import Outcome, Run

TOLERANCES = {
    "fp32": {"loss": 1e-6, "norm": 1e-5, "weight": 2e-5},
    "16 bits": {"loss": 1e-5, "norm": 1e-4, "weight": 2e-5},
}
"""Loss and gradient norm relative, weights absolute. In 16 bits a master's last bit may round its copy another way."""


def kind_of(run: Run) -> str:
    return "fp32" if run.precision == "fp32" else "16 bits"


def deviations(found: Outcome, plain: Outcome) -> dict[str, float]:
    """The largest of each kind over all steps; infinite where other steps were skipped, or ranks disagree."""
    if found.skipped != plain.skipped or found.copies_differ:
        return dict.fromkeys(("loss", "norm", "weight"), math.inf)
    assert found.weights.keys() == plain.weights.keys()
    norms = [(a, b) for a, b, skipped in zip(found.norms, plain.norms, plain.skipped, strict=True) if not skipped]
    return {
        "loss": max(_relative(a, b) for a, b in zip(found.losses, plain.losses, strict=True)),
        "norm": max(_relative(a, b) for a, b in norms),
        "weight": max(_apart(weight, plain.weights[name]) for name, weight in found.weights.items()),
    }


def share(run: Run, errors: dict[str, float]) -> float:
    """The largest deviation as a share of what is allowed; must be <= 1."""
    return max(errors[name] / tolerance for name, tolerance in TOLERANCES[kind_of(run)].items())


def order_of(run: Run) -> tuple[object, ...]:
    """Runs of equal keys sum in one order."""
    per_micro_batch = run.stage >= 2 and run.accumulation > 1
    return run.recipe, per_micro_batch


def same_bits(one: Outcome, other: Outcome) -> bool:
    return one.losses == other.losses and all(
        torch.equal(weight, other.weights[name]) for name, weight in one.weights.items()
    )


def _relative(found: float, wanted: float) -> float:
    return _finite(abs(found - wanted) / abs(wanted))


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return _finite(float((found - wanted).abs().max()))


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf
