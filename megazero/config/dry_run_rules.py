"""What the settings of a dry run must be. The rules of `rules.py` on one section; see there."""

from __future__ import annotations

from collections.abc import Iterator

from megazero.base.errors import ConfigError
from megazero.config.fields import flag_of, value_of
from megazero.config.layout import parse_bytes
from megazero.config.registry import Rules, show
from megazero.config.schema import RunConfig

DRY_RUN_RULES = Rules()
_rule = DRY_RUN_RULES.rule

_WORLD = "dry_run.world_size"
_RANK = "dry_run.rank"
_MEMORY = "dry_run.device_memory"


@_rule()
def _device_memory(config: RunConfig, world: int | None) -> Iterator[str]:
    try:
        parse_bytes(config.dry_run.device_memory)
    except ConfigError as error:
        yield str(error)


@_rule(_WORLD, _RANK)
def _rank(config: RunConfig, world: int | None) -> Iterator[str]:
    rank, size = config.dry_run.rank, world or config.dry_run.world_size
    if config.dry_run.dry_run and size is not None and rank >= size:
        yield f"{show(config, _RANK)} is not one of {size} ranks, which count from 0. Use --rank {size - 1} or less."


@_rule()
def _only_in_a_dry_run(config: RunConfig, world: int | None) -> Iterator[str]:
    """A recipe may keep the numbers of its dry run; a flag that has no effect is a mistake."""
    if config.dry_run.dry_run:
        return
    for key in (_WORLD, _RANK, _MEMORY):
        if config.origins.get(key, "").startswith("flag"):
            yield (
                f"{show(config, key)} is for a dry run; a run has the ranks that its launcher starts. "
                f"Give --dry-run too, or leave out {flag_of(key)}."
            )


@_rule("model.vocab_size")
def _vocabulary(config: RunConfig, world: int | None) -> Iterator[str]:
    if config.dry_run.dry_run and config.model.vocab_size is None and value_of(config, "data.tokenizer_model"):
        yield (
            f"the vocabulary's size is unknown: a dry run reads no files, and "
            f"{show(config, 'data.tokenizer_model')} is one. Give --vocab-size N."
        )
