"""What `megazero plan` recommends, written as a ds_config and planned again, is the plan that it printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megazero.cli import main

GIVEN: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "fp32": {"train_batch_size": 1024},
    "16-bit sums": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": "auto",
    },
    "auto": {
        "fp16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "offload_optimizer": {"device": "nvme", "nvme_path": "/disk", "ratio": 0.5},
            "offload_param": None,
        },
    },
    "old": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "cpu_offload": True}},
    "first format": {"fp16": {"enabled": True}, "zero_optimization": True, "optimizer": {"type": "SGD"}},
    "recomputed": {
        "bf16": {"enabled": True},
        "activation_checkpointing": {
            "partition_activations": True,
            "cpu_checkpointing": True,
            "contiguous_memory_optimization": True,
            "number_checkpoints": 4,
        },
    },
    "tensor parallel": {
        "bf16": {"enabled": True},
        "tensor_parallel": {"autotp_size": 2},
        "activation_checkpointing": {"profile": False},
    },
}
MACHINES = {
    "70B on 64": "--model llama3-70b --world-size 64 --device-memory 80GB",
    "13B on 8": "--model 13B --world-size 8 --device-memory 80GB",
    "small devices": "--model 7B --world-size 8 --device-memory 24GB",
    "70B on 8": "--model llama3-70b --world-size 8 --device-memory 80GB --cpu-memory 800GB",
    "a sequence too long": "--model 7B --world-size 8 --device-memory 12GB --seq-length 16384",
    "7B on 1024": "--model 7B --world-size 1024 --device-memory 141GB",
}


def plan(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["plan", *words.split()])
    found = capsys.readouterr()
    assert status != 2, found.err
    return status, found.out


def printed(said: str) -> dict[str, Any]:
    """The ds_config in an answer."""
    found = json.loads(said[said.index("\n  {") : said.rindex("}\n") + 1])
    assert isinstance(found, dict)
    return found


def headline(said: str) -> tuple[str, str]:
    """The recommended row's name and GiB."""
    name, size = re.findall(r"^fastest that fits: (.*?)(?: with .*)?\n  (.*) GiB", said, re.MULTILINE)[0]
    return name, size


@pytest.mark.parametrize("machines", MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize("given", GIVEN.values(), ids=list(GIVEN))
def test_planned_again_it_is_the_same_plan(
    given: dict[str, Any] | None, machines: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(given))
    status, said = plan(f"{machines} --micro-batch-size 2" if given is None else f"{path} {machines}", capsys)
    if "fastest that fits: " not in said:
        assert "it is the fastest that fits" in said or status == 1
        return
    path.write_text(json.dumps(printed(said)))
    length = re.search(r"--seq-length \d+$", said, re.MULTILINE)  # what no ds_config can say
    shorter = length[0] if length else "".join(re.findall(r" --seq-length \d+(?= --prec)", said))
    again, more = plan(f"{path} {re.sub('--seq-length .*', '', machines) if shorter else machines} {shorter}", capsys)
    name, size = headline(said)
    assert again == 0
    assert f"ds_config.json is {name} (the row marked >): fits, {size} GiB a device" in more
    assert "it is the fastest that fits" in more
