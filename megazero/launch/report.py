"""`megazero report`: what a run would find on this machine, on one short page.

Versions, devices, backends, threads and memory; then the optional packages, with the pip line of those that are
missing. Every package that the code asks `base/optional.py` for stands in OPTIONAL, and nothing else does.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megazero.base.launch import environment, usable_cores
from megazero.base.optional import available

OPTIONAL = {
    "torchao": ("torchao", "8-bit Adam (--optimizer adam8bit)"),
    "bitsandbytes": ("bitsandbytes", "8-bit Adam (--optimizer adam8bit)"),
    "matplotlib": ("matplotlib", "loss.png"),
    "tensorboard": ("tensorboard", "--tensorboard-dir"),
    "wandb": ("wandb", "--wandb-project"),
    "gigatoken": ("gigatoken", "faster tokenizing"),
    "zstandard": ("zstandard", ".zst corpora"),
    "pyarrow": ("pyarrow", ".parquet corpora"),
}
"""Module -> what pip calls it, what it is for."""
_PINNED = ("torch", "numpy", "transformers", "safetensors")


def report(words: Sequence[str]) -> int:
    """Print the page; exit status 0."""
    parser = argparse.ArgumentParser(prog="megazero report", description="What a run would find on this machine.")
    parser.parse_args(list(words))
    print("\n".join([*_versions(), *_devices(), *_machine(), *_packages()]))
    return 0


def _versions() -> list[str]:
    found = [f"{name} {_version(name)}" for name in _PINNED]
    return [
        f"megazero {_version('megazero')} · Python {platform.python_version()} · {platform.platform(terse=True)}",
        " · ".join(found),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _devices() -> list[str]:
    """GPUs as torch sees them, and the backends that it was built with."""
    import torch  # slow to import: only this command needs it
    import torch.distributed as dist

    visible = environment().get("CUDA_VISIBLE_DEVICES")
    narrowed = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines = [f"devices     none but the CPU{narrowed}"]
    if count:
        kinds: dict[str, int] = {}
        for index in range(count):
            properties = torch.cuda.get_device_properties(index)
            name = f"{properties.name}, {_size(properties.total_memory)}"
            kinds[name] = kinds.get(name, 0) + 1
        lines = [f"devices     {number} × {name}{narrowed}" for name, number in kinds.items()]
        lines.append(f"CUDA        {torch.version.cuda}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")
    backends = [f"{name} {'yes' if dist.is_backend_available(name) else 'no'}" for name in ("gloo", "nccl")]
    return [*lines, f"backends    {' · '.join(backends)}"]


def _machine() -> list[str]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = [f"CPU         {usable_cores()} threads, {_size(pages)} of memory"]
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        small = "; NCCL wants 1 GiB: docker run --shm-size 1g" if usage.total < 2**30 else ""
        lines.append(f"/dev/shm    {_size(usage.free)} free of {_size(usage.total)}{small}")
    return lines


def _packages() -> list[str]:
    here = [name for name in OPTIONAL if available(name)]
    versions = [f"{name} {_version(OPTIONAL[name][0])}" for name in here]
    lines = [f"optional    {', '.join(versions) or 'nothing'}"]
    for name, (pip, purpose) in OPTIONAL.items():
        if name not in here:
            lines.append(f"  missing   {name:<13} for {purpose}: pip install {pip}")
    return lines


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
