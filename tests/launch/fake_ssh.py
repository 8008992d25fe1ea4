"""An `ssh` that notes its words and runs the command line on this machine, as a login shell there would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT, rank_environment

SSH = """#!/bin/sh
while [ "$1" = -o ] || [ "$1" = -p ]; do echo "$1 $2" >> "$SSH_LOG"; shift 2; done
echo "host $1" >> "$SSH_LOG"
[ "$1" = down ] && { echo "ssh: connect to host down: Connection refused" >&2; exit 255; }
unset FROM_THE_LAUNCH OMP_NUM_THREADS PYTHONPATH
exec sh -c "$2"
"""


class Field:
    """A folder with a fake ssh, a hostfile, and what the scripts of a launch write."""

    def __init__(self, folder: Path, hostfile: str = "") -> None:
        self.folder = folder
        ssh = folder / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(SSH)
        ssh.chmod(0o755)
        (folder / "hosts").write_text(hostfile)

    def script(self, text: str) -> str:
        (self.folder / "script.py").write_text(text)
        return "script.py"

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        """`megazero launch words` in the folder."""
        environment = rank_environment() | {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SSH_LOG": str(self.folder / "ssh.log"),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        environment = {name: value for name, value in environment.items() if name != "CUDA_VISIBLE_DEVICES"}
        return subprocess.Popen(
            [sys.executable, "-m", "megazero.cli", "launch", *words],
            cwd=self.folder,
            env=environment | {"PYTHONPATH": str(ROOT)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        with self.start(*words, **variables) as process:
            try:
                out, err = process.communicate(timeout=120)
            finally:
                process.kill()  # one that hangs fails the test and no more
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def ssh_log(self) -> list[str]:
        path = self.folder / "ssh.log"
        return path.read_text().splitlines() if path.exists() else []
