"""Dry runs: every recipe fits, what is printed is what is built, exit statuses, and 405B parameters on 1,024 ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from megazero.config.flags import main_config
from megazero.config.recipe import RECIPES
from megazero.train.dryrun import dry_run
from megazero.train.entry import run
from tests.harness import ROOT, rank_environment

NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))
WORLD = {"llama3_8b.yaml": 32}
SMALL = (
    *("--num-layers", "8", "--hidden-size", "64", "--num-attention-heads", "8", "--vocab-size", "500"),
    *("--seq-length", "64", "--global-batch-size", "16", "--train-iters", "1", "--precision", "bf16", "--dry-run"),
)


def plan(*flags: str) -> int:
    """The exit status of `pretrain_gpt.py flags`, in this process."""
    try:
        return run(dry_run, main_config(list(flags)))
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_fits_without_its_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = main_config(["--recipe", name, "--dry-run", "--vocab-size", "512"])
    flags = [] if config.dry_run.world_size else ["--world-size", str(WORLD.get(name, 1))]
    if "tokenizer_model" in (RECIPES / name).read_text():
        flags += ["--vocab-size", "4096"]
    assert plan("--recipe", name, "--dry-run", *flags) == 0
    said = capsys.readouterr().out
    assert "fits: " in said
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv", "dualpipev"]
)
def test_what_is_said_of_a_pipeline(schedule: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--pipeline-model-parallel-size", "4", "--tensor-model-parallel-size", "2", "--world-size", "8")
    assert plan(*SMALL, *flags, "--pipeline-schedule", schedule, "--rank", "7") == 0
    said = capsys.readouterr().out
    assert "dry run of 8 ranks: pp 4 · tp 2; rank 7 is pp 3, dp 0, cp 0, tp 1" in said
    assert f"schedule: {schedule}, idle " in said
    even, formula = re.findall(r"idle ([\d.]+%) of the busy time with equal stages \(formula ([\d.]+%)\)", said)[0]
    assert even == formula
    assert said.count("│") == 4
    for axis, operation in [("pp", "send"), ("tp", "all-gather"), ("tp", "reduce-scatter")]:
        assert re.search(rf"{axis} +{operation} +[\d,]+ elements +[\d.]+ GB", said)
    for component in ("weights", "gradients", "master weights", "optimizer state", "activations", "pipeline buffers"):
        assert re.search(rf"{component} +[\d.]+ GiB", said)


def test_what_is_said_of_zero_and_offload(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--world-size", "4", "--num-layers", "4", "--hidden-size", "256")
    assert plan(*SMALL, *flags, "--zero-stage", "2") == 0
    said = capsys.readouterr().out
    assert "ZeRO 2" in said and re.search(r"gradient buckets +[\d.]+ GiB", said) and "CPU memory" not in said
    assert plan(*SMALL, *flags, "--zero-stage", "3", "--offload-optimizer", "cpu", "--offload-param", "cpu") == 0
    device, elsewhere = capsys.readouterr().out.split("CPU memory of this rank\n")
    assert re.search(r"gathered weights +[\d.]+ GiB", device) and "optimizer state" not in device
    for component in ("weights", "gradients", "master weights", "optimizer state"):
        assert re.search(rf"^  {component} +[\d.]+ GiB", elsewhere, re.MULTILINE)
    nvme = ("--offload-optimizer", "nvme", "--offload-optimizer-path", "/no/such/disk")
    assert plan(*SMALL, *flags, "--zero-stage", "3", *nvme) == 0  # a plan reads and writes nothing
    assert re.search(r"^files of this rank\n  master weights +[\d.]+ GiB", capsys.readouterr().out, re.MULTILINE)


def test_zero_and_offload_are_among_the_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--recipe", "llama3_8b.yaml", "--dry-run", "--world-size", "32", "--device-memory", "26GiB")
    assert plan(*flags, "--zero-stage", "0") == 1
    said = capsys.readouterr().out
    for words in ("--zero-stage 2:", "--offload-optimizer cpu --zero-stage 1:", "--offload-param cpu"):
        assert (
            words in said
            or words.replace("--offload-optimizer cpu --zero-stage 1", "--zero-stage 1 --offload-optimizer cpu") in said
        )


def test_what_does_not_fit_names_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--recipe", "llama3_8b.yaml", "--dry-run", "--world-size", "32")
    assert plan(*flags, "--device-memory", "26GiB") == 1
    said = capsys.readouterr().out
    assert re.search(r"does not fit: [\d.]+ GiB; [\d.]+ GiB over --device-memory 26GiB", said)
    found = re.findall(r"  would fit with (.*): ([\d.]+) GiB", said)
    assert any("--recompute-granularity" in words for words, _ in found)
    assert any("--tensor-model-parallel-size 8" in words for words, _ in found)
    for words, size in found:  # each remedy does what it says
        assert plan(*flags, "--device-memory", "26GiB", *words.split()) == 0
        assert f"fits: {size} GiB" in capsys.readouterr().out
    assert plan(*flags, "--device-memory", "1GiB") == 1
    assert "use more or larger devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tensor-model-parallel-size", "3"), "--num-attention-heads 8 is not divisible"),
        (("--pipeline-model-parallel-size", "4", "--world-size", "6"), "world size 6 does not fit"),
        (("--pipeline-model-parallel-size", "4", "--global-batch-size", "3", "--world-size", "4"), "micro-batches"),
        (("--world-size", "4", "--rank", "4"), "--rank 4 is not one of 4 ranks"),
    ],
)
def test_a_bad_configuration_is_2(flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*SMALL, *flags) == 2
    assert words in capsys.readouterr().err
    assert not dist.is_initialized()


def test_an_unknown_vocabulary_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--recipe", "quickstart.yaml", "--dry-run") == 2
    assert "the vocabulary's size is unknown: a dry run reads no files" in capsys.readouterr().err


def test_only_one_of_several_processes_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert plan(*SMALL) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert plan(*SMALL) == 0
    assert "dry run of 2 ranks: dp 2" in capsys.readouterr().out


def test_405_billion_parameters_on_1024_ranks_take_seconds_and_little_memory() -> None:
    began = time.monotonic()
    words = ["pretrain_gpt.py", "--recipe", "llama3_405b.yaml", "--dry-run", "--rank", "1000"]
    # VmHWM begins with the process; getrusage's peak would begin with that of the test session it was forked from.
    script = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '.')\n"
    script += "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n"
    script += "    print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        env=rank_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "405,853,388,800 parameters" in done.stdout
    assert "rank 1000 is pp 15, dp 5, cp 0, tp 0" in done.stdout
    peak = int(re.findall(r"^peak (\d+)$", done.stdout, re.MULTILINE)[0])
    assert peak < 700_000, "kilobytes, most of them torch's own"
    assert time.monotonic() - began < 110, "5 s on an idle machine"
