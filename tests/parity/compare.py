"""DESIGN.md's tolerances: the same numbers on every layout, in fp32, up to the order of floating-point sums.

A gradient may differ by 1e-4 of its norm, and by the rounding of the sums it comes from: 3e-8 (half a unit in the last
place) of the global norm, which is all there is of a gradient that is zero in theory (a key bias without RoPE). The
weights of such a one, below 1e-6 of the global norm, are not compared: Adam turns noise into whole steps.
"""

from __future__ import annotations

from tests.parity.measure import Outcome

LOSS, NORM, GRADIENT, WEIGHT, ROUNDING, NOISE = 1e-5, 1e-4, 1e-4, 2e-5, 3e-8, 1e-6


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
        overall = sum(float(g.double().square().sum()) for g in a.values()) ** 0.5
        for name, gradient in a.items():
            norm = float(gradient.norm())
            if norm > NOISE * overall:
                noise.discard(name)
            allowed = GRADIENT * norm + ROUNDING * overall
            found["gradient"] = max(found["gradient"], float((gradient - b[name]).norm()) / allowed)
    for name in one.weights.keys() - noise:
        found["weight"] = max(found["weight"], float((one.weights[name] - other.weights[name]).abs().max()) / WEIGHT)
    return found
