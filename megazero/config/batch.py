"""The batch's arithmetic, for flags, recipes and ds_config.json alike.

    samples in a step = samples in a micro-batch · micro-batches of a rank (accumulation) · data-parallel ranks

Two of the three are enough; the third must come out whole. A problem names the values that would work.
"""

from __future__ import annotations

from typing import NamedTuple

from megazero.base.errors import ConfigError
from megazero.config.layout import either, near_divisors, neighbours


class BatchNames(NamedTuple):
    """What the user calls the three numbers."""

    step: str = "--global-batch-size"
    micro: str = "--micro-batch-size"
    accumulation: str = "--gradient-accumulation-steps"


FLAGS = BatchNames()


class Batch(NamedTuple):
    """The three numbers, in samples, samples and micro-batches."""

    step: int
    micro: int
    accumulation: int


def complete_batch(
    step: int | None, micro: int | None, accumulation: int | None, ranks: int, names: BatchNames = FLAGS
) -> Batch:
    """The batch of `ranks` data-parallel ranks from what is known of it; nothing known: one sample a rank.

    Raises ConfigError, with the values that would work, when the numbers do not fit each other. All are >= 1.
    """
    if step is None:
        batch = Batch(0, micro or 1, accumulation or 1)
        return batch._replace(step=batch.micro * batch.accumulation * ranks)
    if micro is None:
        _check_share(step, "micro", names.accumulation, accumulation or 1, ranks, names, accumulation is not None)
        return Batch(step, step // ((accumulation or 1) * ranks), accumulation or 1)
    if accumulation is None:
        _check_share(step, "accumulation", names.micro, micro, ranks, names, stated=True)
        return Batch(step, micro, step // (micro * ranks))
    if step != micro * accumulation * ranks:
        raise ConfigError(_product_problem(step, micro, accumulation, ranks, names))
    return Batch(step, micro, accumulation)


def _product_problem(step: int, micro: int, accumulation: int, ranks: int, names: BatchNames) -> str:
    remedies = [f"{names.step} {micro * accumulation * ranks}"]
    for name, others in ((names.accumulation, micro * ranks), (names.micro, accumulation * ranks)):
        if step % others == 0:
            remedies.append(f"{name} {step // others}")
    if step % (micro * accumulation) == 0:
        remedies.append(_ranks(step // (micro * accumulation)))
    return (
        f"{names.step} {step} is not {names.micro} · {names.accumulation} · data-parallel ranks = "
        f"{micro} · {accumulation} · {ranks} = {micro * accumulation * ranks}. Use {', or '.join(remedies)}."
    )


def _check_share(step: int, sought: str, other: str, size: int, ranks: int, names: BatchNames, stated: bool) -> None:
    """Refuse `step` samples of which each of `ranks` ranks cannot take whole portions of `size`."""
    if step % (size * ranks) == 0:
        return
    what = "samples in a micro-batch" if sought == "micro" else "micro-batches"
    held = f"{names.step} {step}" + (f" with {other} {size}" if stated else "")
    remedies = []
    if step % size == 0:  # ranks that can share what there is
        most = [n for n in range(1, min(step // size, ranks) + 1) if step // size % n == 0][-1]
        remedies.append(f"at most {_ranks(most)}" if step // size < ranks else f"{_ranks(most)}")
    remedies.append(f"{names.step} {either(neighbours(step, size * ranks))}")
    if stated and step % ranks == 0:
        remedies.append(f"{other} {either(near_divisors(step // ranks, size))}")
    division = f"{step} / ({size} · {ranks})" if stated else f"{step} / {ranks}"
    raise ConfigError(
        f"{held} on {_ranks(ranks)} makes {division} = {step / (size * ranks):.3g} {what}, which must be a whole "
        f"number above 0. Use {', or '.join(remedies)}."
    )


def _ranks(number: int) -> str:
    return f"{number} data-parallel rank{'s' if number > 1 else ''}"
