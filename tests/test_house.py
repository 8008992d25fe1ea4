"""The house rules that a machine can check: file sizes and names, torch-free layers, one reader of the environment,
pinned packages, and documents that name only what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megazero"
SOURCES = sorted(
    path for folder in ("megazero", "tools", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
) + sorted(ROOT.glob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_no_file_is_called_utils() -> None:
    assert not [name(path) for path in SOURCES if "util" in path.stem]


def test_files_are_read_in_one_sitting() -> None:
    long = {name(path): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    assert not long, f"files over 400 lines: {long}"


def test_functions_fit_a_screen() -> None:
    long = {
        f"{name(path)}:{node.lineno} {node.name}": lines
        for path in SOURCES
        for node in functions(parsed(path))
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > 70
    }
    assert not long, f"functions over 70 lines (aim at 60): {long}"


def test_files_open_with_a_docstring() -> None:
    bare = [name(path) for path in SOURCES if (tree := parsed(path)).body and not ast.get_docstring(tree)]
    assert not bare


def test_only_base_reads_the_environment() -> None:
    pattern = re.compile(r"os\.environ\b|os\.getenv\b|from os import .*environ")
    readers = {name(path) for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())}
    assert readers == {"megazero/base/launch.py"}


def torch_free_modules() -> list[str]:
    files = [p for layer in ("base", "config", "plan") for p in sorted((PACKAGE / layer).rglob("*.py"))]
    dotted = [name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files]
    return [module for module in dotted if module != "megazero.base.device"]


def test_base_config_and_plan_import_no_torch() -> None:
    modules = torch_free_modules()
    assert {"megazero.base.errors", "megazero.config.schema", "megazero.config.flags"} <= set(modules)
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module({module!r})\nassert 'torch' not in sys.modules, {module!r}\n" for module in modules
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {package_name(line): line.partition("==")[2] for line in lines}


def package_name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_every_package_that_make_installs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"] + extras["plot"] + extras["fast"]
    missing = {package_name(line) for line in wanted} - {"megazero"} - pins().keys()
    assert not missing


def test_pins_are_plain_versions() -> None:
    assert pins()["torch"] == "2.13.0"
    assert not [pin for pin in pins().values() if not re.fullmatch(r"[0-9][0-9a-z.]*", pin)]


def make_targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


def test_make_has_the_promised_targets() -> None:
    promised = {"install", "pretrain", "test", "test-all", "lint", "bench", "gpu-check", "clean"}
    assert promised <= make_targets()
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert set(re.findall(r"^make ([\w-]+)", shown, re.MULTILINE)) == make_targets() - {"help"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_what_exists(document: Path) -> None:
    text = document.read_text()
    assert set(re.findall(r"\bmake ([a-z][\w-]+)(?=[`\s]*(?:#|`|$|ARGS))", text, re.MULTILINE)) <= make_targets()
    folders = "megazero|tests|tools|benchmarks|recipes"
    mentioned = set(re.findall(rf"(?<![\w/.])((?:{folders})/[\w/]+\.(?:py|yaml|md))", text))
    assert not [path for path in sorted(mentioned) if not (ROOT / path).exists()]
    layers = "|".join(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists())
    short = set(re.findall(rf"`((?:{layers})/\w+)(?:\.py)?`", text))  # data/indexed
    assert not [path for path in sorted(short) if not (PACKAGE / f"{path}.py").exists()]


def test_readme_gives_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.search(r"^make pretrain\b", text, re.MULTILINE)
    assert re.search(r"^make test\b", text, re.MULTILINE)


def test_readme_draws_the_packages() -> None:
    (tree,) = re.findall(r"^megazero/\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    drawn = set(re.findall(r"^[ │├└─]*(\w+)/", tree, re.MULTILINE))
    assert drawn == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 100
