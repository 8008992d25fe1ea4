"""`megazero plan`: what it prints, which row a ds_config is, exit statuses, speed, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megazero.cli import main
from tests.harness import ROOT

ON_8 = ("--world-size", "8")


def ds_config(folder: Path, **changes: Any) -> str:
    """A ds_config.json of ZeRO 2 with the optimizer on the CPU."""
    content = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8},
    } | changes
    (folder / "ds_config.json").write_text(json.dumps(content))
    return str(folder / "ds_config.json")


def rows(said: str) -> list[str]:
    return [line for line in said.splitlines() if line[3:6].strip().isdigit() and len(line) > 95]


def test_a_preset_without_a_ds_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "llama3-8b", *ON_8]) == 0
    said = capsys.readouterr().out
    assert "llama3-8b: 8,030,261,248 parameters, 32 layers of 4,096" in said
    assert "1 × 1 × 4,096 tokens" in said
    assert "8, 8 on each of 1 machine; 80.0 GiB each; CPU memory not checked (--cpu-memory)" in said
    assert len(rows(said)) == 13
    first = rows(said)[0].split()
    assert first[:8] == ["0", "device", "device", "15.0", "29.9", "29.9", "59.8", "-"]
    assert first[-2:] == ["too", "much"]
    assert "fastest that fits: ZeRO 2\n" in said
    assert ' "zero_optimization": {"stage": 2}}\n' in said
    assert all(len(line) <= 120 for line in said.splitlines())


def test_a_ds_config_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ds_config(tmp_path)
    assert main(["plan", path, "--model", "7B", *ON_8]) == 0
    said = capsys.readouterr().out
    (own,) = [line for line in rows(said) if line.startswith(">")]
    assert own.split()[1:4] == ["2", "CPU", "device"]
    assert "ds_config.json is ZeRO 2, optimizer on the CPU (the row marked >): fits, " in said
    assert "fastest that fits: ZeRO 2\n" in said
    assert "taken as 33 layers of 4,096" in said
    assert "gradients 500,000,000 elements = " in said and "GB" in said


def test_a_ds_config_that_is_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", ds_config(tmp_path, zero_optimization={"stage": 2}), "--model", "7B", *ON_8]) == 0
    said = capsys.readouterr().out
    assert "it is the fastest that fits" in said
    assert [line[:2] for line in rows(said)].count(">*") == 1


def test_a_ds_config_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ds_config(tmp_path)
    sizes = ("--device-memory", "40GiB", "--cpu-memory", "64GiB", "--micro-batch-size", "1")
    assert main(["plan", path, "--model", "13B", *ON_8, *sizes]) == 1
    said = capsys.readouterr().out
    assert "does not fit, " in said
    assert "GiB over a device's memory and " in said and "GiB over a machine's CPU memory" in said
    assert "fastest that fits: " in said


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "70B", "--world-size", "1", "--device-memory", "4GiB", "--cpu-memory", "16GiB")
    assert main(["plan", *words]) == 1
    said = capsys.readouterr().out
    assert "as it is: nothing fits; the least is " in said
    assert "with activation checkpointing: nothing fits" in said
    assert "sequences of 512: nothing fits" in said
    assert "nothing fits: use more or larger devices, more CPU memory, or tensor parallelism" in said


def test_rungs_below(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "7B", *ON_8, "--device-memory", "24GiB", "--micro-batch-size", "4", "--cpu-memory", "1024GiB")
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "as it is: nothing fits; the least is " in said
    assert " with activation checkpointing\n" in said and " of recomputation a step" in said
    assert "--recompute-granularity full" in said


def test_a_smaller_micro_batch_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "7B", *ON_8, "--device-memory", "23GiB", "--micro-batch-size", "4")
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "fastest that fits: ZeRO 3, optimizer on the CPU with activation checkpointing\n" in said
    assert "faster with smaller portions: ZeRO 3 with activation checkpointing, micro-batch size 2\n" in said


def test_a_tight_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "7B", "--world-size", "1", "--seq-length", "512")
    assert main(["plan", *words, "--device-memory", "1GiB"]) == 1
    least = float(capsys.readouterr().out.split("the least is ")[-1].split()[0])
    assert main(["plan", *words, "--device-memory", f"{least + 0.1:.1f}GiB"]) == 0
    assert "% of the device; the driver and fragmentation take a few GiB too" in capsys.readouterr().out


def test_auto_is_settled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "reduce_bucket_size")
    path = ds_config(
        tmp_path,
        train_micro_batch_size_per_gpu="auto",
        train_batch_size="auto",
        bf16={"enabled": "auto"},
        gradient_accumulation_steps=4,
        zero_optimization={"stage": 3} | dict.fromkeys(sizes, "auto"),
    )
    assert main(["plan", path, "--model", "llama3-8b", *ON_8, "--micro-batch-size", "2"]) == 0
    said = capsys.readouterr().out
    assert "4 × 2 × 4,096 tokens" in said and "bf16 weights" in said
    assert "gradients 16,777,216 elements = 67.1 MB" in said
    assert "weights fetched ahead 15,099,494 elements = 30.2 MB" in said


def test_tensor_parallelism_divides_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ds_config(tmp_path, tensor_parallel={"autotp_size": 4}, zero_optimization={"stage": 0})
    assert main(["plan", path, "--model", "llama3-8b", *ON_8]) == 0
    assert rows(capsys.readouterr().out)[0].split()[4:6] == ["3.7", "7.5"]
    assert main(["plan", path, "--model", "llama3-8b", "--world-size", "6"]) == 2
    assert "--world-size 6 is no multiple of tensor parallelism's 4 ranks." in capsys.readouterr().err


MOMENTS = {"AdamW": 8, "fused_adam": 8, "Lamb": 8, "Lion": 4, "Adagrad": 4, "AdamW8bit": 2, "SGD": 0}
MOMENTS |= {"Adamax": 8, "NAdam": 8, "RAdam": 8, "Adadelta": 8, "Rprop": 8, "ASGD": 4, "RMSprop": 4, "Adafactor": 0}


@pytest.mark.parametrize(
    ("optimizer", "count"),
    [({"type": kind}, count) for kind, count in MOMENTS.items()]
    + [({"type": kind, "params": {"momentum": 0.9}}, count) for kind, count in (("SGD", 4), ("RMSprop", 8))]
    + [({"type": "RMSprop", "params": {"centered": True}}, 8)],
    ids=str,
)
def test_the_moments_are_those_of_the_ds_configs_optimizer(
    optimizer: dict[str, Any], count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ds_config(tmp_path, optimizer=optimizer)
    main(["plan", path, "--model", "8e9", *ON_8])
    said = capsys.readouterr().out
    moments = rows(said)[0].split()[6]
    assert moments == (f"{8e9 * count / 2**30:,.1f}" if count else "-")
    assert f"fp32 gradients, {optimizer['type']}\n" in said
    own = rows(said)[5].removesuffix("  too much").split()  # ZeRO 2, the optimizer on the CPU
    assert float(own[-4]) == pytest.approx(8e9 * (4 + 4 + count) / 2**30, rel=0.1)


def test_muons_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", ds_config(tmp_path, optimizer={"type": "Muon"}), "--model", "8e9", *ON_8])
    assert 8e9 * 4 / 2**30 < float(rows(capsys.readouterr().out)[0].split()[6]) < 8e9 * 5 / 2**30


def test_what_is_not_counted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", ds_config(tmp_path, optimizer={"type": "Adam", "params": {"amsgrad": True}}), "--model", "7B", *ON_8])
    assert "Adam (amsgrad's 4 bytes a parameter not counted)\n" in capsys.readouterr().out


def test_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
        )
    )
    assert main(["plan", "--model", str(tmp_path), "--world-size", "2"]) == 0
    said = capsys.readouterr().out
    assert "124,439,808 parameters" in said and "× 1,024 tokens" in said  # its longest sequence


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--world-size", "8"), "the following arguments are required: --model"),
        (("--model", "7B"), "the following arguments are required: --world-size"),
        (("--model", "7B", "--world-size", "0"), "--world-size 0: at least 1."),
        (("--model", "7B", "--world-size", "8", "--seq-length", "-1"), "--seq-length -1: at least 1."),
        (("--model", "7B", "--world-size", "12"), "--world-size 12 is no multiple of the 8 ranks on a machine."),
        (("--model", "7B", *ON_8, "--device-memory", "big"), "--device-memory 'big' is not a size"),
        (("--model", "7B", *ON_8, "--cpu-memory", "big"), "--cpu-memory 'big' is not a size"),
        (("--model", "8x7B", *ON_8), "--model 8x7B is no preset, no file or folder, and no number."),
        (("--model", "7B", *ON_8, "--gpus", "4"), "unrecognized arguments: --gpus (megazero plan --help says more)."),
        (("no/such.json", "--model", "7B", *ON_8), "no/such.json"),
    ],
)
def test_refusals(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megazero plan: ")
    assert message in said


def test_two_micro_batch_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", ds_config(tmp_path), "--model", "7B", *ON_8, "--micro-batch-size", "2"]) == 2
    said = capsys.readouterr().err
    assert "--micro-batch-size 2, and ds_config.json train_micro_batch_size_per_gpu is 1. Change one of them." in said


def test_an_answer_in_well_under_a_second_without_torch(tmp_path: Path) -> None:
    words = ["plan", ds_config(tmp_path), "--model", "llama3.1-405b", "--world-size", "1024"]
    code = f"import sys, time; began = time.perf_counter()\nfrom megazero.cli import main\nmain({words!r})\n"
    code += "assert 'torch' not in sys.modules; print('took', time.perf_counter() - began, time.process_time())"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("took")[1].split()[1]) < 2.0  # of CPU time; 0.3 s on an idle machine
    assert time.monotonic() - began < 30
