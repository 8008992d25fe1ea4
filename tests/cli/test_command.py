"""`megazero` itself: commands, their help, and the report."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib

import pytest

from megazero.cli import COMMANDS, main
from megazero.engine.optimizers.eight_bit import BACKENDS
from megazero.launch import report
from tests.harness import ROOT


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"megazero {name}" in said for name in COMMANDS)
    assert main([]) == 2


def test_every_command_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as leaving:
            main([name, "--help"])
        assert leaving.value.code == 0
        assert f"megazero {name}" in capsys.readouterr().out


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`megazero plan … | head -1`: the pipe closes before all is written."""
    words = [sys.executable, "-m", "megazero.cli", "plan", "--model", "7B", "--world-size", "8"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            words, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lunch", "megazero: no command 'lunch'. Did you mean 'launch'? There are launch, plan, report."),
        ("x", "megazero: no command 'x'. There are"),
    ],
)
def test_unknown_commands(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert said in capsys.readouterr().err


def test_an_error_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch"]) == 2
    assert capsys.readouterr().err.startswith("megazero launch: no script to launch.")


def test_it_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"megazero": "megazero.cli:main"}
    done = subprocess.run(
        [sys.executable, "-m", "megazero.cli", "lunch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2


def test_the_report_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25
    assert all(len(line) <= 120 for line in lines)
    said = "\n".join(lines)
    for words in ("megazero ", "Python ", "torch ", "devices ", "gloo yes", "CPU ", "optional "):
        assert words in said
    for pip in re.findall(r"pip install (\S+)", said):
        assert pip in [names[0] for names in report.OPTIONAL.values()]


def test_the_report_of_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Properties:
        name, total_memory = "NVIDIA H100 80GB HBM3", 80 * 2**30

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert main(["report"]) == 0
    said = capsys.readouterr().out
    assert "devices     2 × NVIDIA H100 80GB HBM3, 80.0 GiB (CUDA_VISIBLE_DEVICES=0,1)" in said
    assert "bf16 yes" in said


def test_the_report_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "available", lambda name: name != "zstandard")
    assert main(["report"]) == 0
    assert "missing   zstandard     for .zst corpora: pip install zstandard" in capsys.readouterr().out


def test_the_report_knows_every_optional_package() -> None:
    """Those that the code asks base/optional.py for, and that are no requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", line)[0].lower() for line in project["dependencies"]}
    asked = set()
    for path in (ROOT / "megazero").rglob("*.py"):
        if path.parent.name != "launch":
            asked |= set(re.findall(r"""\b(?:require|available)\(\s*"(\w+)""", path.read_text()))
    assert report.OPTIONAL.keys() == (asked | BACKENDS.keys()) - needed
