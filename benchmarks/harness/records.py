# SPDX-License-Identifier: Apache-2.0
"""What every results file says of where its figures come from, and how records are written to be read and compared."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "transformers", "peft", "timm", "peft-promptmoe")


def provenance() -> dict[str, Any]:
    """Versions of what takes part, and the machine."""
    return {"versions": {name: version(name) for name in PACKAGES}, "machine": machine()}


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def rounded(values: Tensor) -> list[float]:
    """Numbers as they are kept, with three decimals."""
    return [round(value, 3) for value in values.tolist()]


def write(path: Path, head: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """One JSON file of a head and records, one record on a line, so that a changed figure is a changed line."""
    lines = ",\n  ".join(json.dumps(record) for record in records)
    start = json.dumps(head, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{start},\n "records": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
