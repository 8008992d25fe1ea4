"""DeepSpeed's flags on a script's own parser."""

from __future__ import annotations

import argparse

from megazero.config.arguments import add_config_arguments


def test_adds_the_three_flags() -> None:
    parser = argparse.ArgumentParser()
    assert add_config_arguments(parser) is parser
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json", "--local_rank=2"])
    assert (args.deepspeed, args.deepspeed_config, args.local_rank) == (True, "ds.json", 2)
    args = parser.parse_args([])
    assert (args.deepspeed, args.deepspeed_config, args.local_rank) == (False, None, -1)


def test_leaves_a_scripts_own_flags_alone() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=7)
    parser.add_argument("--deepspeed", default="own.json")
    args = add_config_arguments(add_config_arguments(parser)).parse_args([])
    assert (args.local_rank, args.deepspeed, args.deepspeed_config) == (7, "own.json", None)
    later = add_config_arguments(argparse.ArgumentParser(), local_rank=False)
    later.add_argument("--local_rank", type=int, default=5)
    assert later.parse_args([]).local_rank == 5
