"""Processes that live and die together, and launches of real scripts: torchrun here, and over a fake ssh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megazero.launch.commands import Command
from megazero.launch.processes import Processes
from tests.harness import ROOT, free_port
from tests.launch.fake_ssh import Field

SAY = """import json, os, sys
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "FROM_THE_LAUNCH"]
said = {name: os.environ.get(name) for name in names} | {"words": sys.argv[1:]}
open(f"rank-{os.environ['RANK']}", "w").write(json.dumps(said))
if sys.argv[1:] == ["fail"]:
    sys.exit(7)
"""
SLEEP = """import os, pathlib, time
pathlib.Path(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(600)
"""


def shell(*lines: str) -> Processes:
    commands = [Command(("sh", "-c", line), {}) for line in lines]
    return Processes(commands, [f"host {number}" for number in range(len(lines))], hold_stdin=False, patience=1.0)


def test_all_end_well(capfd: pytest.CaptureFixture[str]) -> None:
    assert shell("true", "sleep 0.2").wait() == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("end", "status", "words"), [("exit 3", 3, "exited with status 3"), ("kill -9 $$", 137, "signal 9")]
)
def test_the_first_failure_ends_the_others(
    end: str, status: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert shell("sleep 60", f"sleep 0.1; {end}").wait() == status
    assert time.monotonic() - began < 20
    said = capfd.readouterr().err
    assert "megazero launch: host 1 " in said and words in said and "the others are being ended" in said


def test_who_does_not_listen_is_killed_with_what_it_started(tmp_path: Path) -> None:
    line = f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/pid; wait"
    processes = shell(line, f"while [ ! -s {tmp_path}/pid ]; do sleep 0.05; done; exit 1")
    assert processes.wait() == 1
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    processes = shell("sleep 60", "sleep 60")
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    assert processes.wait() == 128 + number
    assert signal.getsignal(number) is before


def test_what_cannot_be_started_leaves_nothing_running() -> None:
    began = time.monotonic()
    with pytest.raises(OSError, match="no-such-program"):
        Processes([Command(("sleep", "60"), {}), Command(("no-such-program",), {})], ["a", "b"], hold_stdin=False)
    assert time.monotonic() - began < 20


def gone(pid: int) -> bool:
    """Whether the process ends within some seconds (an orphan may stay as a zombie in a container)."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def answers(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*"))]


def test_two_processes_on_this_machine(tmp_path: Path) -> None:
    field = Field(tmp_path)
    done = field.run("--num_gpus", "2", field.script(SAY), "--deepspeed", "--lr", "1")
    assert done.returncode == 0, done.stderr
    first, second = answers(tmp_path)
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"], second["LOCAL_RANK"]) == ("0", "1", "2", "1")
    assert first["words"] == ["--deepspeed", "--lr", "1"]
    assert first["OMP_NUM_THREADS"] == "1"  # as it was set
    assert field.ssh_log() == []


def test_hosts_with_different_numbers_of_slots(tmp_path: Path) -> None:
    field = Field(tmp_path, "alpha slots=1\nbeta slots=2\n")
    (tmp_path / ".megazero_env").write_text("FROM_THE_LAUNCH=yes\n")
    words = ("--hostfile", "hosts", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    done = field.run(*words, field.script(SAY), CUDA_VISIBLE_DEVICES="4,5")
    assert done.returncode == 0, done.stderr
    said = answers(tmp_path)
    assert [each["RANK"] for each in said] == ["0", "1", "2"]
    assert [each["LOCAL_RANK"] for each in said] == ["0", "0", "1"]
    assert {each["WORLD_SIZE"] for each in said} == {"3"}
    assert [each["CUDA_VISIBLE_DEVICES"] for each in said] == ["4", "4,5", "4,5"]
    assert {each["FROM_THE_LAUNCH"] for each in said} == {"yes"}
    assert sorted(field.ssh_log()) == ["-o BatchMode=yes", "-o BatchMode=yes", "host alpha", "host beta"]


def test_secrets_come_from_each_machines_own_file(tmp_path: Path) -> None:
    field = Field(tmp_path, "alpha slots=1\nbeta slots=1\n")
    (tmp_path / ".megazero_env").write_text("HF_TOKEN=hidden\n")
    words = ("--hostfile", "hosts", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    done = field.run(*words, field.script("import os; print('has', os.environ['HF_TOKEN'])"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hidden") == 2
    assert "HF_TOKEN not sent" in done.stderr


def test_a_host_that_fails_ends_the_launch(tmp_path: Path) -> None:
    field = Field(tmp_path, "alpha slots=1\ndown slots=1\n")
    words = ("--hostfile", "hosts", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    done = field.run(*words, field.script(SLEEP))
    assert done.returncode == 255
    assert "Connection refused" in done.stderr
    assert "megazero launch: down exited with status 255; the others are being ended" in done.stderr


def test_a_failing_script_fails_the_launch(tmp_path: Path) -> None:
    field = Field(tmp_path)
    done = field.run("--num_gpus", "1", field.script(SAY), "fail")
    assert done.returncode == 1  # torchrun's status for a rank that failed
    assert "exitcode  : 7" in done.stderr


def test_ctrl_c_ends_every_host(tmp_path: Path) -> None:
    field = Field(tmp_path, "alpha slots=1\nbeta slots=1\n")
    words = ("--hostfile", "hosts", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    with field.start(*words, field.script(SLEEP)) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()  # so that a launch that does not listen fails the test and no more
    assert process.returncode == 130, err
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-*") if path.read_text()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_the_command_starts_fast_and_without_torch() -> None:
    code = """import sys
from megazero.cli import main
assert main(["--help"]) == main(["launch", "--num_gpus", "1", "--dry_run", "pretrain_gpt.py"]) == 0
assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0
