"""What a launch would start: devices, threads, addresses, and what goes along to other machines."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from megazero.base import launch as base_launch
from megazero.base.errors import ConfigError
from megazero.launch.commands import is_secret, parse_variables
from megazero.launch.launcher import launch

TORCHRUN = f"{sys.executable} -m torch.distributed.run"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(base_launch, "usable_cores", lambda: 8)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("one slots=4\ntwo slots=2\n")
    for name in ("a.py", "train.py"):
        (tmp_path / name).touch()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert launch(["--dry_run", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, "--num_gpus", "2", "train.py", "--text", "a b")
    assert line == f"OMP_NUM_THREADS=4 {TORCHRUN} --nproc-per-node 2 --standalone train.py --text 'a b'"


def test_without_num_gpus_there_is_a_process_for_each_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for visible, processes in {"5,6,7": 3, "": 1}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        (line,) = said(capsys, "a.py")
        assert f"--nproc-per-node {processes} " in line
        assert "CUDA_VISIBLE_DEVICES" not in line  # it stays as it is
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert "--nproc-per-node 4 " in said(capsys, "a.py")[0]
    assert "--nproc-per-node 3 " in said(capsys, "-i", "localhost:0,1,3", "a.py")[0]
    (line,) = said(capsys, "-e", "localhost:0", "a.py")
    assert line.startswith("CUDA_VISIBLE_DEVICES=1,2,3 ") and "--nproc-per-node 3 " in line


def test_a_port_program_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, "--num_gpus", "1", "--master_port", "1234", "--no_python", "./go")
    assert line.endswith("--nnodes 1 --node-rank 0 --master-addr 127.0.0.1 --master-port 1234 --no-python ./go")
    assert said(capsys, "--num_gpus", "1", "-m", "package.train")[0].endswith("--standalone --module package.train")


def test_slots_are_positions_among_the_visible_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "-i", "localhost:0,2", "a.py")[0].startswith("CUDA_VISIBLE_DEVICES=0,2 OMP_NUM_THREADS=4 ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-9a")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (line,) = said(capsys, "-i", "localhost:0,2", "a.py")
    assert line.startswith(f"CUDA_VISIBLE_DEVICES=4,GPU-9a {TORCHRUN} --nproc-per-node 2 ")
    assert said(capsys, "--num_gpus", "2", "a.py")[0].startswith(TORCHRUN)
    with pytest.raises(ConfigError, match=r"slot 3, but CUDA_VISIBLE_DEVICES=4,5,GPU-9a shows 3 devices"):
        launch(["-i", "localhost:3", "a.py"])
    with pytest.raises(ConfigError, match=r"--num_gpus 4, but CUDA_VISIBLE_DEVICES=4,5,GPU-9a shows 3 devices"):
        launch(["--num_gpus", "4", "a.py"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPUs: any number of processes
    assert "CUDA_VISIBLE_DEVICES" not in said(capsys, "-i", "localhost:0,9", "a.py")[0]


def test_several_machines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    (tmp_path / ".megazero_env").write_text("# for all\nHF_HOME=/data/my models\n")
    lines = said(capsys, "--hostfile", "hosts", "--ssh_port", "2222", "train.py", "--text", "a b")
    first, second = (shlex.split(line) for line in lines)
    assert first[:6] == ["ssh", "-o", "BatchMode=yes", "-p", "2222", "one"]
    assert second[5] == "two"
    inner = second[6]
    assert inner.startswith(f"cd {tmp_path} && exec env ")
    assert "NCCL_DEBUG=WARN" in inner and "CUDA_VISIBLE_DEVICES=0,1,2,3" in inner and "SECRET_TOKEN" not in inner
    assert "HF_HOME='/data/my models'" in inner
    assert inner.endswith(
        f"{sys.executable} -m megazero.cli launch --no_ssh --until-stdin-closes --num_nodes 2 --node_rank 1 "
        "--master_addr one --master_port 29500 --include localhost:0,1 train.py --text 'a b'"
    )
    assert "--include localhost:0,1,2,3 " in first[6]


def test_secrets_are_not_on_command_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hidden")
    monkeypatch.setenv("HF_HOME", "/data")
    assert launch(["--dry_run", "--hostfile", "hosts", "a.py"]) == 0
    said = capsys.readouterr()
    assert "hidden" not in said.out + said.err and "HF_HOME=/data" in said.out
    assert said.err == (
        "megazero launch: HF_TOKEN not sent: command lines are seen by others. If the other machines need it, write "
        "HF_TOKEN=… into .megazero_env in the working directory of each, readable by you alone, or log in there.\n"
    )
    (tmp_path / ".megazero_env").write_text("HF_TOKEN=other\nWANDB_API_KEY=more\nTOKENIZERS_PARALLELISM=false\n")
    assert launch(["--dry_run", "--hostfile", "hosts", "a.py"]) == 0
    said = capsys.readouterr()
    assert "other" not in said.out and "more" not in said.out and "TOKENIZERS_PARALLELISM=false" in said.out
    assert said.err == (
        "megazero launch: HF_TOKEN, WANDB_API_KEY not sent: command lines are seen by others. Each machine reads "
        "its own .megazero_env in the working directory.\n"
    )


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("HF_API_KEYS", True),
        ("TORCH_SECRET_X", True),
        ("db_password", True),
        ("NCCL_DEBUG", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("PYTHONPATH", False),
    ],
)
def test_what_a_secret_is_called(name: str, secret: bool) -> None:
    assert is_secret(name) == secret


def test_users_of_other_machines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("me@one slots=4\ntwo slots=2\n")
    first, second = (shlex.split(line) for line in said(capsys, "-H", "hosts", "-i", "one:0@two", "a.py"))
    assert (first[3], second[3]) == ("me@one", "two")
    assert "--master_addr one " in second[4]


def test_a_script_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"b\.py: no such script in .*\. Check its path; -m runs a module\."):
        launch(["--dry_run", "--num_gpus", "1", "b.py"])


def test_a_machine_at_a_time_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, "--hostfile", "hosts", "--no_ssh", "--node_rank", "1", "a.py")
    assert line.startswith("CUDA_VISIBLE_DEVICES=0,1 OMP_NUM_THREADS=4")
    assert line.endswith("--nnodes 2 --node-rank 1 --master-addr one --master-port 29500 a.py")
    words = ["--no_ssh", "--num_nodes", "3", "--node_rank", "2", "--master_addr", "here", "--num_gpus", "8", "a.py"]
    (line,) = said(capsys, *words)
    assert "--nproc-per-node 8 --nnodes 3 --node-rank 2 --master-addr here" in line


def test_a_hostfile_of_this_machine_alone_needs_no_ssh(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\nother slots=2\n")
    for words in (["--num_nodes", "1"], ["-i", "localhost"], ["-e", "other"]):
        (line,) = said(capsys, "-H", "hosts", *words, "a.py")
        assert "--nproc-per-node 2 --standalone a.py" in line
    assert "--nproc-per-node 1 " in said(capsys, "-H", "hosts", "--num_nodes", "1", "--num_gpus", "1", "a.py")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hostfile", "nowhere", "a.py"], "--hostfile nowhere: no such file."),
        (["-H", "hosts", "--num_nodes", "3", "a.py"], "--num_nodes 3: hosts names 2. Add lines, or ask for fewer."),
        (["-H", "hosts", "--num_gpus", "3", "a.py"], "--num_gpus 3: hosts gives two 2 slots."),
        (["-H", "hosts", "-i", "three", "a.py"], "no host three."),
        (["-H", "hosts", "--no_ssh", "--node_rank", "2", "a.py"], "--node_rank 2 of 2 machines in hosts"),
        (["-i", "worker", "a.py"], "no host worker. There are localhost."),
    ],
)
def test_what_cannot_be_started(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch(words)
    assert message in str(caught.value)


def test_other_machines_must_find_the_first(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1\nother slots=1\n")
    with pytest.raises(ConfigError, match=r"localhost is the first of 2 machines, .* Give --master_addr"):
        launch(["-H", "hosts", "a.py"])


def test_ssh_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"no ssh on this machine's PATH, and 2 machines to start. Install an ssh client"
    ):
        launch(["-H", "hosts", "a.py"])


def test_lines_of_the_file_of_variables() -> None:
    assert parse_variables("# a\n\nA=1\nB=x=y\n", ".megazero_env") == {"A": "1", "B": "x=y"}
    with pytest.raises(ConfigError, match=r"\.megazero_env, line 2: 'export B=1' is not NAME=value\."):
        parse_variables("A=1\nexport B=1\n", ".megazero_env")
