"""Dense matrix-multiply peaks that vendors state for their GPUs, for MFU.

TFLOP/s without structured sparsity, bf16 and fp16 products summed in fp32. Source: the vendor's data sheets (their
"with sparsity" figures halved). Where a row has no TF32 or bf16 the GPU has no such tensor cores. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Peak rates of one GPU in TFLOP/s; None: it has no unit for that."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


_PEAKS: tuple[tuple[str, Peaks], ...] = (  # words of a device name (the first row whose words all occur is it); rates
    ("GB300", Peaks(2500, 2500, 1250, 80)),
    ("B300", Peaks(2250, 2250, 1125, 75)),
    ("GB200", Peaks(2500, 2500, 1250, 80)),
    ("B200", Peaks(2250, 2250, 1125, 75)),
    ("B100", Peaks(1750, 1750, 875, 60)),
    ("GH200", Peaks(989, 989, 494, 67)),
    ("H200 NVL", Peaks(835, 835, 417, 60)),
    ("H200", Peaks(989, 989, 494, 67)),
    ("H100 PCIe", Peaks(756, 756, 378, 51)),
    ("H100 NVL", Peaks(835, 835, 417, 60)),
    ("H100", Peaks(989, 989, 494, 67)),
    ("H20", Peaks(148, 148, 74, 44)),
    ("A100", Peaks(312, 312, 156, 19.5)),
    ("A800", Peaks(312, 312, 156, 19.5)),
    ("A40", Peaks(149.7, 149.7, 74.8, 37.4)),
    ("A30", Peaks(165, 165, 82, 10.3)),
    ("A10", Peaks(125, 125, 62.5, 31.2)),
    ("L40S", Peaks(362, 362, 183, 91.6)),
    ("L40", Peaks(181, 181, 90.5, 90.5)),
    ("L4", Peaks(121, 121, 60, 30.3)),
    ("RTX 6000 Ada", Peaks(364, 364, 182, 91.1)),
    ("RTX A6000", Peaks(154.8, 154.8, 77.4, 38.7)),
    ("RTX 5090", Peaks(209.5, 209.5, 104.8, 104.8)),
    ("RTX 4090", Peaks(165, 165, 82.6, 82.6)),
    ("RTX 3090", Peaks(71, 71, 35.6, 35.6)),
    ("V100 PCIE", Peaks(None, 112, None, 14)),
    ("V100", Peaks(None, 125, None, 15.7)),
    ("T4", Peaks(None, 65, None, 8.1)),
)

_DIFFERENT = {"LAPTOP", "MIG", "D", "TI", "MAX"}
"""Words that make a name another, slower or faster, chip (or a slice of one) than the row it would match."""


def vendor_peaks(name: str) -> Peaks | None:
    """The peaks of the GPU that its driver calls `name`, e.g. "NVIDIA H100 80GB HBM3"; None if not in the table."""
    words = _words(name)
    if words & _DIFFERENT:
        return None
    return next((peaks for wanted, peaks in _PEAKS if _words(wanted) <= words), None)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Z0-9]+", text.upper()))
