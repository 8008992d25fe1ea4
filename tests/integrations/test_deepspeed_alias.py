"""`import deepspeed` under the alias: every name of the table, what is said of names that are not there, metadata, when
it refuses, and running a script with it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megazero.base.errors import ConfigError
from megazero.integrations import deepspeed as alias

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_real_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves the process as it was."""
    yield
    alias.uninstall()
    assert "deepspeed" not in sys.modules


@pytest.fixture
def installed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # other tests of this session have imported transformers
        alias.install()


@pytest.mark.usefixtures("installed")
class TestNames:
    @pytest.mark.parametrize("module", alias.TABLE)
    def test_the_whole_table(self, module: str) -> None:
        home = importlib.import_module(module)
        for name, target in alias.TABLE[module].items():
            if target.startswith("!"):
                assert not hasattr(home, name)
                with pytest.raises(AttributeError, match=rf"megazero has no {module}.{name}. \w.*\."):
                    getattr(home, name)
            elif target in alias.REMEDIES and not hasattr(home, name):
                with pytest.raises(AttributeError, match=f"{module}.{name} stands for megazero.*: "):
                    getattr(home, name)
            elif name != "*":
                assert getattr(home, name) is not None

    def test_the_ways_to_import(self) -> None:
        code = """
import deepspeed
from deepspeed import zero, comm as dist
from deepspeed.pipe import PipelineModule, LayerSpec, TiedLayerSpec, PipeDataParallelTopology
from deepspeed.runtime.pipe import PipeDataParallelTopology as second
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology as third
from deepspeed.runtime.activation_checkpointing import checkpointing
import deepspeed.runtime.zero.partition_parameters as pp
from deepspeed.moe.layer import MoE
assert deepspeed.PipeDataParallelTopology is PipeDataParallelTopology is second is third
assert deepspeed.moe.layer.MoE is MoE and deepspeed.checkpointing.checkpoint is checkpointing.checkpoint
assert deepspeed.runtime.zero.partition_parameters is pp
assert dist.get_rank() == 0 and dist.get_world_size() == 1 and dist.ReduceOp.SUM and not dist.is_initialized()
dist.barrier()
assert "LayerSpec" in dir(deepspeed.pipe) and "PipelineParallelGrid" not in dir(deepspeed.pipe)
"""
        exec(code, {})

    def test_star(self) -> None:
        found: dict[str, object] = {}
        exec("from deepspeed.pipe import *", found)
        assert {"PipelineModule", "ProcessTopology"} <= found.keys() and "PipelineParallelGrid" not in found

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            ("import deepspeed; deepspeed.initialise", "no deepspeed.initialise. Did you mean deepspeed.initialize?"),
            ("from deepspeed.pipe import PipelineModul", "Did you mean deepspeed.pipe.PipelineModule?"),
            ("from deepspeed.pipe import FusedAdam", "Did you mean deepspeed.ops.adam.FusedAdam?"),
            ("import deepspeed.utilz", "no deepspeed.utilz. Did you mean deepspeed.utils?"),
            ("import deepspeed.ops.adam.FusedAdam", "deepspeed.ops.adam.FusedAdam is no module. Import it from"),
            ("import deepspeed.compression.helper", "megazero knows no deepspeed.compression. See TABLE in megazero"),
            ("from deepspeed.pipe import PipelineParallelGrid", r"Describe the layout with megazero.Topology.build\("),
            ("from deepspeed.utils import groups; groups.get_data_parallel_group()", "Ask while there is an engine"),
            ("from deepspeed.utils.groups import initialize", r"laid out by MoE\(…, ep_size=…\)"),
        ],
    )
    def test_what_is_said_of_others(self, code: str, said: str) -> None:
        with pytest.raises((AttributeError, ImportError, ConfigError), match=said.replace("?", r"\?")):
            exec(code, {})

    def test_a_target_that_does_not_exist(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {"a": "megazero.nowhere:A", "b": "megazero.base.errors:B", "c": "tests.integrations.broken:C"}
        monkeypatch.setitem(alias.TABLE, "deepspeed.later", names)
        later = importlib.import_module("deepspeed.later")
        with pytest.raises(
            AttributeError, match=r"later.a stands for megazero.nowhere.A, which this megazero does not have. Upgrade"
        ):
            _ = later.a
        with pytest.raises(ImportError, match=r"later.b stands for megazero.base.errors.B, which"):
            exec("from deepspeed.later import b", {})
        with pytest.raises(ModuleNotFoundError, match="nothing_like_it"):  # not taken for a missing target
            _ = later.c


def test_metadata_and_spec() -> None:
    assert importlib.util.find_spec("deepspeed") is None
    alias.install()
    alias.install()
    assert importlib.util.find_spec("deepspeed") is not None
    assert importlib.metadata.version("deepspeed") == alias.VERSION
    assert importlib.metadata.metadata("deepspeed")["Name"] == "deepspeed"
    assert importlib.metadata.packages_distributions()["deepspeed"] == ["deepspeed"]
    assert importlib.import_module("deepspeed").__version__ == alias.VERSION
    alias.uninstall()
    assert importlib.util.find_spec("deepspeed") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("deepspeed")


def real_one(folder: Path, metadata: bool = True) -> None:
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "__init__.py").write_text("real = True\n")
    if metadata:
        (folder / "deepspeed-0.1.dist-info").mkdir()
        (folder / "deepspeed-0.1.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.1\n")


@pytest.mark.parametrize("metadata", [True, False])
def test_refuses_where_the_real_one_is(metadata: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_one(tmp_path, metadata)
    monkeypatch.syspath_prepend(tmp_path)
    version = "0.1" if metadata else r"\(.*__init__.py\)"
    with pytest.raises(ConfigError, match=rf"deepspeed {version} is installed here.*install\(force=True\)"):
        alias.install()
    alias.install(force=True)
    assert importlib.metadata.version("deepspeed") == alias.VERSION
    assert not hasattr(importlib.import_module("deepspeed"), "real")


def test_a_folder_of_that_name_is_no_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    alias.install()
    assert importlib.import_module("deepspeed").__version__ == alias.VERSION


def test_refuses_when_the_real_one_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
        with pytest.raises(ConfigError, match=r"imported already.*Call install\(\) before"):
            alias.install(force=True)


def test_warns_when_transformers_has_looked_already(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = types.ModuleType("transformers.integrations.deepspeed")
    looked.DeepSpeedConfig = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, looked.__name__, looked)
    monkeypatch.delitem(sys.modules, "accelerate.accelerator", raising=False)
    with pytest.warns(
        RuntimeWarning, match="^transformers.integrations.deepspeed was imported before.*install.. first"
    ):
        alias.install()


def test_runs_a_script_or_a_module(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("word = 'from next door'\n")
    (tmp_path / "script.py").write_text(
        "import sys, deepspeed, neighbour\nprint(__name__, sys.argv[1:], neighbour.word, deepspeed.__version__)\n"
    )
    run = [sys.executable, "-m", alias.__name__]
    for how, where in ([str(tmp_path / "script.py")], ROOT), (["-m", "script"], tmp_path):
        done = subprocess.run(
            [*run, *how, "--lr", "1"],
            cwd=where,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == f"__main__ ['--lr', '1'] from next door {alias.VERSION}\n", done.stderr
    assert not done.stderr


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--help"]])
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"usage: python -m megazero.integrations.deepspeed \{script.py"):
        alias.main(arguments)
