"""Optional packages: found, absent, broken, and apex told from its namesake."""

from __future__ import annotations

import sys

import pytest

from megazero.base.errors import MegazeroError
from megazero.base.optional import MissingPackageError, available, require


def test_what_is_there_is_returned():
    assert available("json.decoder")
    assert require("json", pip="json", purpose="to read JSON").loads("[1]") == [1]


def test_what_is_absent_is_named_with_its_pip_line():
    assert not available("no_such_package")
    assert not available("no_such_package.part")
    with pytest.raises(MissingPackageError) as caught:
        require("no_such_package", pip="no-such-package", purpose="to dream")
    assert (
        str(caught.value)
        == "no_such_package is not installed; it is needed to dream. Install it: pip install no-such-package"
    )
    assert isinstance(caught.value, MegazeroError)
    assert isinstance(caught.value, ImportError)


def test_what_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('needs a driver')")
    monkeypatch.syspath_prepend(tmp_path)
    assert available("broken_package")
    with pytest.raises(
        MissingPackageError, match=r"cannot be imported \(RuntimeError: needs a driver\).*--force-reinstall bp"
    ):
        require("broken_package", pip="bp", purpose="to test")


@pytest.mark.parametrize("source", ["", "import pyramid_of_2013"], ids=["importable", "fails when imported"])
def test_apex_is_not_its_namesake(tmp_path, monkeypatch, source):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert not available("apex")
    with pytest.raises(MissingPackageError, match="the package of that name here is another project"):
        require("apex", pip="git+https://github.com/NVIDIA/apex", purpose="to fuse")
    sys.modules.pop("apex", None)


def test_nvidias_apex_is_found(tmp_path, monkeypatch):
    (tmp_path / "apex" / "multi_tensor_apply").mkdir(parents=True)
    for folder in ("apex", "apex/multi_tensor_apply"):
        (tmp_path / folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert available("apex")
    sys.modules.pop("apex", None)
