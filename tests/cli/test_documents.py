"""docs/launch.md, docs/rlhf.md and docs/zero.md: their flags exist, their ds_configs are read, their commands parse."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from megazero.config.deepspeed import read_deepspeed
from megazero.config.fields import FIELDS
from megazero.launch import arguments
from megazero.plan import planner
from tests.harness import ROOT

PAGES = [ROOT / "docs" / name for name in ("launch.md", "rlhf.md", "zero.md")]
FOREIGN = {
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--cpus-per-task",
    "--time",
    "--signal",
    "--kill-on-bad-exit",
}
"""SLURM's."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_is_one_page_and_its_flags_exist(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 170  # tables
    known = set(arguments._parser()._option_string_actions) | set(planner._parser()._option_string_actions)
    known |= {field.flag for field in FIELDS.values()} | {"--deepspeed_config", "--recipe", "--dry-run"} | FOREIGN
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known
    for path in re.findall(r"\b(?:megazero|recipes|tests|tools)/[\w/]+\.(?:py|yaml)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_ds_configs_are_read(page: Path) -> None:
    for block in blocks(page.read_text(), "json"):
        read_deepspeed(json.loads(block))


def commands(page: Path) -> list[list[str]]:
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    return [shlex.split(words, comments=True) for words in re.findall(r"megazero launch (-.*?)'?\n", text)]


def test_launches_parse() -> None:
    found = commands(ROOT / "docs" / "launch.md")
    assert len(found) >= 7
    for words in found:
        known = [re.sub(r"^\$\w+$", "4" if "NNODES" in word else "1", word) for word in words]
        if "pretrain_gpt.py" in known or "train.py" in known:
            arguments.parse(known)


def test_the_kubernetes_template_is_yaml() -> None:
    (block,) = blocks((ROOT / "docs" / "launch.md").read_text(), "yaml")
    service, job = yaml.safe_load_all(block)
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"] == job["metadata"]["name"]
    (line,) = pod["containers"][0]["args"]
    words = shlex.split(line.replace("$JOB_COMPLETION_INDEX", "3"))
    assert words[:3] == ["exec", "megazero", "launch"]
    found = arguments.parse(words[3:])
    assert (found.script, found.node_rank, found.num_nodes) == ("pretrain_gpt.py", 3, job["spec"]["completions"])
