"""DeepSpeed's command line for a script's own argparse parser, as `deepspeed.add_config_arguments` adds it.

parser = megazero.add_config_arguments(argparse.ArgumentParser())
args = parser.parse_args()                                # --deepspeed --deepspeed_config ds_config.json
engine, *_ = megazero.initialize(args=args, model=model)
"""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser, local_rank: bool = True) -> argparse.ArgumentParser:
    """Add --deepspeed, --deepspeed_config and --local_rank to a parser, leaving out those that it has, and return it.

    Args:
        local_rank: launchers of DeepSpeed's kind pass --local_rank; its value is not used, since the environment has
            LOCAL_RANK. Say False when the script adds that flag itself afterwards.
    """
    taken = parser._option_string_actions  # argparse has no public list of its flags
    group = parser.add_argument_group("DeepSpeed", "megazero reads DeepSpeed's configurations")
    if "--deepspeed" not in taken:
        group.add_argument("--deepspeed", action="store_true", help="train with megazero's engine")
    if "--deepspeed_config" not in taken:
        group.add_argument("--deepspeed_config", metavar="FILE", help="ds_config.json, for megazero.initialize")
    if local_rank and "--local_rank" not in taken:
        group.add_argument("--local_rank", type=int, default=-1, help="from a launcher; LOCAL_RANK decides")
    return parser
