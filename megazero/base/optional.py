"""Packages that megazero can use but does not need: found at run time, named with their pip line when missing.

apex is found by `apex.multi_tensor_apply`: what `pip install apex` brings is another project of that name
(reference: https://github.com/microsoft/torchscale/issues/18).
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from megazero.base.errors import MegazeroError

_PROBES = {"apex": "apex.multi_tensor_apply"}
"""Modules that tell a package from a namesake."""


class MissingPackageError(MegazeroError, ImportError):
    """An optional package is not installed, or is installed and cannot be imported."""


def available(module: str) -> bool:
    """Whether `module` (dots allowed) is installed. A top-level module is not imported to find out."""
    return _found(_PROBES.get(module, module))


def require(module: str, pip: str, purpose: str) -> ModuleType:
    """The imported `module`, needed for `purpose` ("to draw loss.png"), installed by `pip install <pip>`.

    Raises MissingPackageError with the pip line when it is absent, and with the cause when its own import fails.
    """
    if not available(module):
        namesake = (
            f" (the package of that name here is another project: it has no {_PROBES[module]})"
            if _found(module)
            else ""
        )
        raise MissingPackageError(
            f"{module} is not installed{namesake}; it is needed {purpose}. Install it: pip install {pip}"
        )
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise MissingPackageError(
            f"{module} is installed but cannot be imported ({type(error).__name__}: {error}); it is needed {purpose}. "
            f"Repair it: pip install --force-reinstall {pip}"
        ) from error


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # noqa: BLE001 - finding a submodule imports its parents, which may fail with whatever they like
        return False
