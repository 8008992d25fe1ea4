"""Pretrain a GPT-style language model: parse the settings, then train. `--help` lists every flag."""

from __future__ import annotations

import sys

from megazero.base.launch import Launch
from megazero.config.flags import main_config

if __name__ == "__main__":
    config = main_config(sys.argv[1:], quiet=Launch.from_environment().rank != 0)
    from megazero.train.entry import run  # torch is imported only now: --help and errors answer at once
    from megazero.train.loop import pretrain

    sys.exit(run(pretrain, config))
