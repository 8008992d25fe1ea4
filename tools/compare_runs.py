#!/usr/bin/env python3
"""Where two runs part: loss, gradient norm and, with --weights, every tensor of their checkpoints.

    python tools/compare_runs.py runs/a runs/b --weights

Exit status: 0 equal within the tolerances, 1 different, 2 they cannot be compared. Any two layouts can be.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megazero.base.errors import MegazeroError
from megazero.train.compare import GRAD_NORM_RTOL, LOSS_RTOL, WEIGHT_ATOL, compare_runs


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("a", type=Path, help="--output-dir of a run")
    flags.add_argument("b", type=Path, help="--output-dir of another")
    flags.add_argument("--weights", action="store_true", help="compare the weights of their checkpoints too")
    flags.add_argument("--iteration", type=int, help="of the checkpoints; by default the last that both have")
    flags.add_argument("--top", type=int, default=10, help="tensors to show, worst first (default: %(default)s)")
    tolerances = flags.add_argument_group("what counts as equal")
    tolerances.add_argument("--rtol", type=float, default=LOSS_RTOL, help="losses, relative (default: %(default)s)")
    tolerances.add_argument(
        "--grad-norm-rtol", type=float, default=GRAD_NORM_RTOL, help="gradient norms, relative (default: %(default)s)"
    )
    tolerances.add_argument(
        "--weight-atol", type=float, default=WEIGHT_ATOL, help="weights, absolute (default: %(default)s)"
    )
    args = flags.parse_args(argv)
    if args.iteration is not None and not args.weights:
        flags.error("--iteration chooses the checkpoints: give --weights too")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        metrics = compare_runs(args.a, args.b, loss_rtol=args.rtol, grad_norm_rtol=args.grad_norm_rtol)
        print(f"a: {args.a}\nb: {args.b}\n{metrics.text()}")
        equal = metrics.equal
        if args.weights:
            from megazero.train.compare_weights import compare_weights  # imports torch

            weights = compare_weights(args.a, args.b, iteration=args.iteration, atol=args.weight_atol)
            print(weights.text(args.top))
            equal = equal and weights.equal
    except MegazeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("equal within the tolerances" if equal else "DIFFERENT")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
