"""Whole-number arithmetic of a layout, for everyone who needs it before torch is there.

world size = tp · pp · cp · dp        padded vocabulary = ceil(vocabulary / divisor) · divisor
"""

from __future__ import annotations

import math
import re

from megazero.base.errors import ConfigError
from megazero.config.schema import RunConfig


def padded_vocab_size(vocab_size: int, divisor: int) -> int:
    """Embedding rows for a vocabulary: the next multiple of the divisor. Does not depend on the layout."""
    return -(-vocab_size // divisor) * divisor


def smallest_world_size(config: RunConfig) -> int:
    """tp · pp · cp: the ranks of one replica of the model."""
    parallel = config.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    return max(math.prod(sizes), 1)


def check_world_size(world: int, *, pp: int, cp: int, tp: int, dp: int | None = None) -> None:
    """Raise ConfigError unless `world` ranks can be laid out as pp·dp·cp·tp (dp None: whatever is left)."""
    problem = world_size_problem(world, pp=pp, cp=cp, tp=tp, dp=dp)
    if problem is not None:
        raise ConfigError(problem)


def world_size_problem(world: int, *, pp: int, cp: int, tp: int, dp: int | None = None) -> str | None:
    """Why `world` ranks cannot be laid out so, with the nearest world sizes that can; None when they can."""
    if min(pp, cp, tp, world) < 1:
        return f"world size {world}, tp {tp}, pp {pp}, cp {cp}: each is a whole number >= 1. Correct the smaller ones."
    model = pp * cp * tp
    wanted = f"tp·pp·cp = {tp}·{pp}·{cp} = {model}"
    if dp is not None:
        if world == model * dp:
            return None
        rule, start = f"{wanted} times dp = {dp}: the world size must be that product", str(model * dp)
    else:
        if world % model == 0:
            return None
        rule, start = f"{wanted}: the world size must be a multiple of it", either(neighbours(world, model))
    return f"world size {world} does not fit {rule}. Start {start} ranks, or change the parallel sizes."


def neighbours(number: int, step: int) -> list[int]:
    """The positive multiples of `step` just below and just above a number that is none itself."""
    below = number // step * step
    return [below, below + step] if below else [step]


def near_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` just below and just above `wanted`, which is none itself."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return [n for n in divisors if n < wanted][-1:] + [n for n in divisors if n > wanted][:1]


def either(numbers: list[int]) -> str:
    """`6 or 8`, for a remedy."""
    return " or ".join(str(number) for number in numbers)


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares of train, validation and test from `969,30,1` (or `969/30/1`); they sum to 1, and missing ones are 0.

    Raises ConfigError when the text is not one to three numbers >= 0 with a positive first.
    """
    try:
        numbers = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        numbers = []
    good = 1 <= len(numbers) <= 3 and all(0 <= number < math.inf for number in numbers) and numbers[0] > 0
    if not good:
        raise ConfigError(
            f"--split {text!r} is not a split: give one to three numbers >= 0 for train, validation and test, "
            f"the first above 0, such as 969,30,1."
        )
    train, valid, test = (*numbers, 0.0, 0.0)[:3]
    total = train + valid + test
    return train / total, valid / total, test / total


_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str) -> int:
    """Bytes from `80GiB` (2³⁰), `80 GB` (10⁹) or `141e9`.

    Raises ConfigError when it is not a positive number with such a unit, or a small one without.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:e\+?\d{1,2})?) *([kmgt]?i?b|)", text.strip().lower())
    number = float(match.group(1)) * _UNITS.get(match.group(2), 0) if match else 0.0
    if match and not match.group(2) and 1 <= number < 2**20:
        raise ConfigError(f"--device-memory {text} is {text} bytes. Write {text}GiB.")
    if number < 1:
        raise ConfigError(
            f"--device-memory {text!r} is not a size: a number, followed by GiB, GB, MiB or another such unit, or by "
            f"nothing for bytes. Use 80GiB, for instance."
        )
    return int(number)
