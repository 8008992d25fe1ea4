"""The command line: one flag for each field of the schema, Megatron's spellings, `--recipe` and `--print-config`.

    argv -> underscores to dashes -> unknown and renamed flags refused -> argparse -> a layer of settings
    defaults < preset < recipe < ds_config < that layer -> RunConfig

Imports no torch, so that --help and every error answer at once.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from megazero.base.errors import ConfigError
from megazero.config.decode import DecodeError, decode, describe, did_you_mean
from megazero.config.deepspeed import KeyReport, read_deepspeed
from megazero.config.deepspeed_pretrain import pretraining_layer
from megazero.config.derive import derive
from megazero.config.fields import FIELDS, SECTIONS, Field, docstrings
from megazero.config.layers import Layer, Setting, assemble
from megazero.config.layout import smallest_world_size
from megazero.config.megatron import ALIASES, GROUP_QUERY_ATTENTION, explain
from megazero.config.recipe import read_recipe, to_yaml
from megazero.config.rules import find_problems
from megazero.config.schema import RunConfig


def main_config(argv: Sequence[str], *, quiet: bool = False) -> RunConfig:
    """The configuration of a command line, for an entry point: what is wrong goes to stderr and ends the process.

    Checks all that can be known without the number of ranks (`validate.resolve` checks the rest and fills in what is
    derived). Exits with status 2 on an error, 0 after --help and --print-config. `quiet`: another rank says it.
    """
    try:
        config, report = parse_with_report(argv)
        problems = find_problems(derive(config, None), None)
        if problems:
            raise ConfigError(*problems)
    except ConfigError as error:
        if not quiet:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if report is not None and not quiet:
        print(report.text(), flush=True)
    return config


def parse_run_config(argv: Sequence[str]) -> RunConfig:
    """The configuration of a command line (without the program's name), `origins` filled for every key.

    Derived values are still None. Raises ConfigError for unknown, renamed, malformed and contradictory flags and for
    a bad recipe or ds_config; raises SystemExit(0) after printing for --help and --print-config.
    """
    return parse_with_report(argv)[0]


def parse_with_report(argv: Sequence[str]) -> tuple[RunConfig, KeyReport | None]:
    """The same, and what became of each key of the ds_config, if there is one."""
    words = [_normalise(word) for word in argv]
    parser = build_parser()
    problems = _unknown_flags(words, parser)
    if problems:
        raise ConfigError(*problems)
    given, stray = parser.parse_known_args(words, argparse.Namespace(settings={}, problems=[]))
    given.problems += [f"{word!r} follows no flag that takes it; write --flag VALUE." for word in stray]
    if len(given.recipe) > 1:
        given.problems.append("--recipe is given twice; give one, which may name another as its base:.")
    if given.problems:
        raise ConfigError(*given.problems)
    lowest: Layer = {}
    if given.group_query_attention:
        lowest = {"model.num_query_groups": Setting(1, f"flag {GROUP_QUERY_ATTENTION}")}
    recipe = read_recipe(given.recipe[0]) if given.recipe else []
    source, report = _ds_config(given), None
    if source is not None:
        layer, report = pretraining_layer(read_deepspeed(source), [lowest, *recipe], given.settings)
        recipe = [*recipe, layer]
    config = assemble([*recipe, given.settings], below_preset=lowest)
    if given.print_config:
        _print_config(config)
    return config, report


def _ds_config(given: argparse.Namespace) -> str | None:
    """The ds_config that --deepspeed and --deepspeed_config name together."""
    files = {name for name in (given.deepspeed, given.deepspeed_config) if isinstance(name, str)}
    if len(files) > 1:
        raise ConfigError(
            f"--deepspeed {given.deepspeed} and --deepspeed_config {given.deepspeed_config} name two files; give one."
        )
    if given.deepspeed is not None and not files:
        raise ConfigError(
            "--deepspeed needs its configuration. Give --deepspeed_config ds_config.json too, or leave it out: ZeRO is "
            "there anyway, as --zero-stage."
        )
    return files.pop() if files else None


def build_parser() -> argparse.ArgumentParser:
    """The parser: a group for each section of the schema, then Megatron's spellings."""
    parser = _Parser(
        usage="%(prog)s [--recipe FILE] [--flag VALUE ...]",
        description="Later wins: defaults, preset, recipe, flags. Underscores and --flag=value work too.",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file of settings, looked up as given, then in recipes/",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every value with its origin, as a recipe, and exit"
    )
    texts = docstrings()
    for section in SECTIONS:
        group = parser.add_argument_group(section, texts[section])
        for field in (field for field in FIELDS.values() if field.section == section):
            _add_field(group, field, texts[field.key])
    group = parser.add_argument_group("Megatron's spellings")
    for flag, (key, value, text) in ALIASES.items():
        group.add_argument(flag, action=_Alias, dest=key, const=value, nargs=0, help=text)
    group.add_argument(
        GROUP_QUERY_ATTENTION,
        action="store_true",
        help="num-query-groups is 1 unless a flag, recipe or preset sets it",
    )
    group = parser.add_argument_group("DeepSpeed's spellings")
    group.add_argument(
        "--deepspeed", nargs="?", const=True, metavar="FILE", help="read --deepspeed_config, or this ds_config.json"
    )
    group.add_argument(
        "--deepspeed-config",
        metavar="FILE",
        help='ds_config.json: settings between recipe and flags; "auto" in it means: from the flags',
    )
    group.add_argument(
        "--local-rank", metavar="N", help="what some launchers pass; not used, since the environment has LOCAL_RANK"
    )
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's, except that a flag's name is never broken at a hyphen."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """argparse, except that an error is raised instead of printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} (--help lists every flag).")


class _SetField(argparse.Action):
    """Decodes the flag's text into `namespace.settings`; what does not fit goes to `namespace.problems`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        flag = str(option_string)
        field = FIELDS[self.dest]
        try:
            value = not flag.startswith("--no-") if field.is_switch else decode(values, field.kind)
        except DecodeError as error:
            namespace.problems.append(f"{flag}: {error}")
        else:
            _record(namespace, self.dest, value, flag)


class _Alias(argparse.Action):
    """Sets the field that a Megatron spelling stands for."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        _record(namespace, self.dest, self.const, str(option_string))


def _record(namespace: argparse.Namespace, key: str, value: Any, flag: str) -> None:
    """Note a setting. One flag given twice: the last wins. Two flags that contradict each other: a problem."""
    before = namespace.settings.get(key)
    if before is not None and before.origin != f"flag {flag}" and before.value != value:
        namespace.problems.append(f"{before.origin.removeprefix('flag ')} and {flag} contradict each other; give one.")
    namespace.settings[key] = Setting(value, f"flag {flag}")


def _add_field(group: argparse._ArgumentGroup, field: Field, text: str) -> None:
    names = [field.flag, f"--no-{field.flag[2:]}"] if field.is_switch else [field.flag]
    shape: dict[str, Any] = {"nargs": 0} if field.is_switch else {"metavar": _metavar(field)}
    if typing.get_origin(field.kind) is tuple:
        shape["nargs"] = "+"
    help_text = f"{text} (default: {_default(field, text)})".replace("%", "%%")
    group.add_argument(*names, action=_SetField, dest=field.key, default=argparse.SUPPRESS, help=help_text, **shape)


def _default(field: Field, text: str) -> str:
    if field.default is None:
        return "derived" if "Derived:" in text else "none"
    if field.kind is bool:
        return "on" if field.default else "off"
    if isinstance(field.default, tuple):
        return " ".join(field.default) or "none"
    return str(field.default)


def _metavar(field: Field) -> str:
    words = describe(field.kind)
    if words.startswith(("one of ", "some of ")):
        return "{" + words.partition(" of ")[2].replace(" ", "") + "}"
    return {"a whole number": "N", "a number": "X", "a list of texts": "TEXT"}.get(words, "TEXT")


def _normalise(word: str) -> str:
    """`--num_layers=4` -> `--num-layers=4`; values are left alone."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z]\S*", name) else word


def _unknown_flags(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """One line for each flag that is not ours: what became of it, or the nearest that exists."""
    actions = parser._option_string_actions  # argparse has no public list of its flags
    problems = []
    for word in words:
        name, equals, _ = word.partition("=")
        if not re.fullmatch(r"--?[A-Za-z][\w.-]*", name) or name == "-h":
            continue
        if name not in actions:
            reason = explain(name)
            hint = did_you_mean("--" + name.lstrip("-"), actions)
            problems.append(
                f"{name}: {reason}" if reason else f"unknown flag {name}.{hint or ' --help lists every flag.'}"
            )
        elif equals and actions[name].nargs == 0:
            problems.append(f"{word}: this flag takes no value; write {' or '.join(actions[name].option_strings)}.")
    return problems


def _print_config(config: RunConfig) -> NoReturn:
    """Print the settings as they would be with the fewest ranks that the layout allows, and what is wrong with them."""
    world_size = smallest_world_size(config)
    filled = derive(config, world_size)
    print(f"# Derived values are those of {world_size} rank{'s' if world_size > 1 else ''}.")
    print(to_yaml(filled), end="")
    for problem in find_problems(filled, world_size):
        print(f"problem: {problem}", file=sys.stderr)
    raise SystemExit(0)
