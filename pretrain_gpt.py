"""Pretrain a GPT-style language model: parse the settings, then train. `--help` lists every flag."""

from __future__ import annotations

import sys

from megazero.base.launch import Launch
from megazero.config.flags import main_config
from megazero.config.schema import RunConfig

if __name__ == "__main__":
    config: RunConfig = main_config(sys.argv[1:], quiet=Launch.from_environment().rank != 0)
    from megazero.train.entry import run  # torch is imported only now: --help and errors answer at once

    if config.dry_run.dry_run:
        from megazero.train.dryrun import dry_run as work
    else:
        from megazero.train.loop import pretrain as work

    sys.exit(run(work, config))
