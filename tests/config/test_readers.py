"""No setting is accepted and ignored: every field of the schema is read by code outside the config layer.

The scan follows types, not names alone: `x.lr` counts as a read of optimizer.lr only where x is known to be an
OptimizerConfig, by annotation, by assignment from one, or as `….config.optimizer`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megazero.config.fields import FIELDS, SECTIONS

PACKAGE = Path(__file__).resolve().parents[2] / "megazero"
CLASSES = {cls.__name__: section for section, cls in SECTIONS.items()}
RUN = "(run)"

CONSUMED_BY_CONFIG = {
    "model.preset": "layers.py puts the preset's values below the recipe's",
    "training.train_samples": "derive.py turns it into train_iters",
}
"""Fields whose whole meaning is other fields."""


class Scan(ast.NodeVisitor):
    """Collects the recipe keys that one module reads into `found`."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: set[str] = set()
        self.names: list[dict[str, str]] = [{}]
        self.attributes: list[dict[str, str]] = [{}]
        self.declared: list[list[str]] = [[]]
        self.visit(tree)

    def section(self, node: ast.expr) -> str | None:
        """The section (or RUN) that an expression evaluates to, or None."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.names) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            owner = self.section(node.value) or None
            if owner == RUN:
                return node.attr if node.attr in SECTIONS else None
            if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self.attributes[-1]:
                return self.attributes[-1][node.attr]
            if owner is None and node.attr == "config" and not _is_self(node.value):
                return RUN  # run.config, engine.config
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        section = self.section(node.value)
        if isinstance(node.ctx, ast.Load) and f"{section}.{node.attr}" in FIELDS:
            self.found.add(f"{section}.{node.attr}")
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {arg.arg: _annotated(arg.annotation) for arg in every}
        self.names.append({name: section or "" for name, section in scope.items()})
        self.generic_visit(node)
        self.names.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.attributes.append(self._attributes(node))
        self.declared.append([ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)])
        self.generic_visit(node)
        self.declared.pop()
        self.attributes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    self.names[-1][name.id] = self.section(value) or ("" if not self._passes_run_on(value) else RUN)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self.names[-1][node.target.id] = _annotated(node.annotation) or ""

    def visit_Call(self, node: ast.Call) -> None:
        """`getattr(optimizer, f.name) for f in fields(cls)` reads the fields that the class around it declares."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and ast.unparse(node.args[1]) == "f.name":
            section = self.section(node.args[0])
            self.found |= {f"{section}.{name}" for name in self.declared[-1]} & set(FIELDS)

    def _passes_run_on(self, node: ast.expr) -> bool:
        """Whether this call is given a whole run first, as in config = _settle(resolve(config, n), device)."""
        if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name):
            return self.section(node.args[0]) == RUN or self._passes_run_on(node.args[0])
        return False

    @staticmethod
    def _attributes(tree: ast.ClassDef) -> dict[str, str]:
        """Attributes of self that a class declares, or fills from an argument, with a section's type."""
        found: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign):
                target = node.target.attr if isinstance(node.target, ast.Attribute) else getattr(node.target, "id", "")
                found[target] = _annotated(node.annotation) or ""
            if isinstance(node, ast.FunctionDef):
                arguments = {arg.arg: _annotated(arg.annotation) for arg in [*node.args.args, *node.args.kwonlyargs]}
                for line in ast.walk(node):
                    if isinstance(line, ast.Assign) and len(line.targets) == 1:
                        found |= _filled(line.targets[0], line.value, arguments)
        return {name: section for name, section in found.items() if section}


def _filled(target: ast.expr, value: ast.expr, arguments: dict[str, str | None]) -> dict[str, str]:
    """{"config": "model"} for `self.config = config` where that argument is a TransformerConfig."""
    pairs = [(target, value)]
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = list(zip(target.elts, value.elts, strict=False))
    found = {}
    for left, right in pairs:
        if isinstance(left, ast.Attribute) and _is_self(left.value):
            if isinstance(right, ast.Name):
                found[left.attr] = arguments.get(right.id) or ""
            elif isinstance(right, ast.Attribute) and isinstance(right.value, ast.Name):
                inside_run = arguments.get(right.value.id) == RUN and right.attr in SECTIONS
                found[left.attr] = right.attr if inside_run else ""
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _annotated(annotation: ast.expr | None) -> str | None:
    if isinstance(annotation, ast.BinOp):  # X | None
        return _annotated(annotation.left) or _annotated(annotation.right)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _annotated(ast.parse(annotation.value, mode="eval").body)
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", None)
    return RUN if name == "RunConfig" else CLASSES.get(str(name))


def reads(source: str) -> set[str]:
    return Scan(ast.parse(source)).found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(config: RunConfig): return config.training.seed", {"training.seed"}),
        ("def f(config: 'RunConfig | None'): return config.training.seed", {"training.seed"}),
        ("def f(model: TransformerConfig, *, data: DataConfig): return model.num_layers + data.seq_length",
         {"model.num_layers", "data.seq_length"}),
        ("def f(config: RunConfig):\n  t, m = config.training, config.model\n  return t.seed, m.hidden_size",
         {"training.seed", "model.hidden_size"}),
        ("def f(config: RunConfig):\n  config = settle(config, 2)\n  return config.training.seed", {"training.seed"}),
        ("def f(config: RunConfig):\n  config = g(h(config, 2), 3)\n  return config.training.seed", {"training.seed"}),
        ("class A:\n  lr: float\n  def f(o: OptimizerConfig): return [getattr(o, f.name) for f in fields(A)]",
         {"optimizer.lr"}),
        ("def f(run: Run): return run.config.optimizer.lr", {"optimizer.lr"}),
        ("class A:\n  config: OptimizerConfig\n  def f(self): return self.config.lr", {"optimizer.lr"}),
        ("class A:\n  def __init__(self, c: TransformerConfig, n: int):\n    self.c, self.n = c, n\n"
         "  def f(self): return self.c.num_layers", {"model.num_layers"}),
        ("class A:\n  def __init__(self, c: RunConfig):\n    self.o = c.optimizer\n  def f(self): return self.o.lr",
         {"optimizer.lr"}),
        ("def f(config): return config.lr", set()),
        ("def f(model): return model.num_layers", set()),
        ("class A:\n  def f(self): return self.model.num_layers, self.num_layers", set()),
        ("def f(config: RunConfig): config.training.seed = 3", set()),
        ("def f(config: DataConfig): return config.lr", set()),
        ("'config.training.seed'  # config.training.seed", set()),
        ("def g(config: RunConfig): pass\ndef f(config): return config.training.seed", set()),
    ],
)  # fmt: skip
def test_the_scan_sees_reads_and_nothing_else(source: str, found: set[str]) -> None:
    assert reads(source) == found


def read_keys() -> dict[str, set[str]]:
    """Recipe key -> the modules outside megazero/config, and entry points, that read it."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "config"]
    files += sorted(PACKAGE.parent.glob("*.py"))
    keys: dict[str, set[str]] = {}
    for path in files:
        for key in reads(path.read_text()):
            keys.setdefault(key, set()).add(path.relative_to(PACKAGE.parent).as_posix())
    return keys


def test_every_field_has_a_reader() -> None:
    unread = set(FIELDS) - set(read_keys()) - set(CONSUMED_BY_CONFIG)
    assert not unread, f"accepted and ignored: {sorted(unread)}"


def test_fields_that_config_itself_consumes_are_consumed() -> None:
    assert "training.train_samples" in reads((PACKAGE / "config" / "derive.py").read_text())
    assert '"model.preset"' in (PACKAGE / "config" / "layers.py").read_text()
    assert not set(CONSUMED_BY_CONFIG) & set(read_keys()), "has a reader outside: take it off the list"
