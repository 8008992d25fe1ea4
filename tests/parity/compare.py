"""DESIGN.md's tolerances: the same numbers on every layout, in fp32, up to the order of floating-point sums.

A gradient below 1e-6 of the global norm is rounding noise around a true zero (a key bias without RoPE, say). It must be
noise on the other layout too; its weight is not compared, since Adam turns noise into whole steps.
"""

from __future__ import annotations

from tests.parity.measure import Outcome

LOSS, NORM, GRADIENT, WEIGHT, NOISE = 1e-5, 1e-4, 1e-4, 2e-5, 1e-6


def worst(one: Outcome, other: Outcome) -> dict[str, float]:
    """Largest deviation of each kind as a share of what DESIGN.md allows; all must be <= 1."""
    assert one.weights.keys() == other.weights.keys()
    found = {
        "loss": max(abs(a - b) / abs(a) for a, b in zip(one.losses, other.losses, strict=True)) / LOSS,
        "norm": max(abs(a - b) / a for a, b in zip(one.norms, other.norms, strict=True)) / NORM,
        "gradient": 0.0,
        "weight": 0.0,
    }
    noise = set(one.weights)
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert a.keys() == b.keys()
        floor = NOISE * sum(float(g.double().square().sum()) for g in a.values()) ** 0.5
        for name, gradient in a.items():
            if float(gradient.norm()) < floor:
                deviation = float(b[name].norm()) / floor
            else:
                noise.discard(name)
                deviation = float((gradient - b[name]).norm() / gradient.norm()) / GRADIENT
            found["gradient"] = max(found["gradient"], deviation)
    for name in one.weights.keys() - noise:
        found["weight"] = max(found["weight"], float((one.weights[name] - other.weights[name]).abs().max()) / WEIGHT)
    return found
