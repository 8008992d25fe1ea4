"""The launcher's words: both spellings, the script's own words untouched, and every refusal."""

from __future__ import annotations

import pytest

from megazero.base.errors import ConfigError
from megazero.launch.arguments import parse


def test_underscores_and_dashes_are_one() -> None:
    assert parse(["--num_gpus", "2", "--num-nodes=1", "a.py"]) == parse(["--num-gpus=2", "--num_nodes", "1", "a.py"])


def test_what_follows_the_script_is_the_scripts() -> None:
    words = ["--num_gpus", "7", "--deepspeed", "--", "--help", "-x"]
    found = parse(["--num_gpus", "2", "train.py", *words])
    assert (found.script, found.num_gpus) == ("train.py", 2)
    assert found.words == tuple(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no script to launch. Write megazero launch --num_gpus 2 train.py, for instance."),
        (["--num_gpu", "2", "a.py"], "unknown flag --num_gpu. Did you mean '--num_gpus'?"),
        (["--num_gpus", "two", "a.py"], "--num_gpus/--num-gpus: invalid int value: 'two'"),
        (["--num_gpus", "0", "a.py"], "--num_gpus 0: at least 1."),
        (["--master_port", "-1", "a.py"], "--master_port -1: at least 1."),
        (["-i", "a", "-e", "b", "a.py"], "--include and --exclude: give one"),
        (["-i", "a", "--num_gpus", "2", "a.py"], "--num_gpus and --include: give one; --include says which devices"),
        (["-H", "f", "-e", "a", "--num_nodes", "2", "a.py"], "--num_nodes and --exclude: give one"),
        (["--no_ssh", "a.py"], "say which machine it is with --node_rank 0, 1, …"),
        (["--no_ssh", "--node_rank", "0", "--num_nodes", "2", "a.py"], "--num_nodes 2 needs --master_addr"),
        (
            ["--no_ssh", "--node_rank", "1", "a.py"],
            "--node_rank 1 of 1 machines: they count from 0. Check --num_nodes.",
        ),
        (["--node_rank", "1", "a.py"], "--node_rank is for --no_ssh"),
        (["--num_nodes", "2", "a.py"], "--num_nodes 2 needs --hostfile, which names the machines"),
        (
            ["--launcher", "slurm", "a.py"],
            "--launcher is a flag of DeepSpeed's launcher and not of this one: machines are",
        ),
        (["--bind-cores-to-rank", "a.py"], "not of this one: set OMP_NUM_THREADS, or start under numactl or taskset."),
        (["--module", "--no_python", "a"], "--module and --no_python: give one; a module is run by Python."),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert message in str(caught.value)


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(["--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert "--num_gpus" in said
    assert "until-stdin-closes" not in said
