# SPDX-License-Identifier: Apache-2.0
"""Reading the committed results: records by what they are of, and the names that methods go by in tables."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from .rows import DISPATCHERS, Row

FOLDER = Path(__file__).resolve().parents[1] / "results"
NAMES = {
    "base": "frozen",
    "head": "head only",
    "full": "full fine-tuning",
    "lora": "LoRA r8",
    "prompt": "PEFT prompt tuning, 20",
    "prefix": "PEFT prefix tuning, 20",
    "static": "deep prompts, `num_experts=1`",
    "vpt-deep": "VPT-Deep",
    "vapt": "VAPT",
    "mept-sample": 'MEPT, `routing="sample"`',
    "mept-centered": 'MEPT, `routing="sample"`, `router_centering=True`',
    "mept-token": 'MEPT, `routing="token"`',
    "static-shared": "deep prompts, `num_experts=1` and a shared expert, 10",
    "static-inputs": 'deep prompts, `num_experts=1`, `start_scale="inputs"`',
    "mept-token-inputs": 'MEPT, `routing="token"`, `start_scale="inputs"`',
    "mept-sample-inputs": 'MEPT, `routing="sample"`, `start_scale="inputs"`',
    **{f"static-{slots}": f"deep prompts, `num_experts=1`, {slots}" for slots in (5, 20, 50, 100)},
    "lora-r1-qv": "LoRA r1 on queries and values",
    **{f"lora-r{rank}": f"LoRA r{rank}" for rank in (1, 2, 4, 16)},
    **{
        f"mept-{routing}-{slots}x4": f'MEPT, `routing="{routing}"`, {slots} prompts'
        for routing in ("sample", "token")
        for slots in (2, 5, 20)
    },
    **{f"mept-sample-{number}": f'MEPT, `routing="sample"`, {number} experts' for number in (2, 8, 16)},
    "mept-centered-16": 'MEPT, `routing="sample"`, `router_centering=True`, 16 experts',
    "mept-token-16": 'MEPT, `routing="token"`, 16 experts',
    "head concat": "head on the features of all three",
    **{
        f"{method} {backbone}": f"{shown} {on}"
        for method, shown in (("head", "head"), ("vpt-deep", "VPT-Deep"), ("vapt", "VAPT"))
        for backbone, on in (
            ("dinov2", "on DINOv2-S"),
            ("digits", "on `digits`"),
            ("photos", "on `photos`"),
            ("ensemble", "on each, mean of the three's probabilities"),
        )
    },
    **{f"pmoe-{dispatcher}": f'pMoE, `dispatcher="{dispatcher}"`' for dispatcher in DISPATCHERS},
    "pmoe-none-equal": 'pMoE, `dispatcher="none"`, as large as `"token"`',
    "pmoe-alone": "pMoE of DINOv2-S alone",
    "lora dinov2": "LoRA r8 on DINOv2-S",
    "lora_r8": "LoRA r8",
    "prompt_tuning": "PEFT prompt tuning",
    "prefix_tuning": "PEFT prefix tuning",
    "p_tuning": "PEFT p-tuning",
    "static_sized": "deep prompts",
    "vpt_deep": "VPT-Deep",
    "mept_sample": "MEPT by sample",
    "mept_token": "MEPT by token",
    "promotion": "ProMotion",
}


@lru_cache
def results(name: str) -> dict[str, Any]:
    """The content of a results file; empty if it is not there yet."""
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def exact_records() -> list[dict[str, Any]]:
    """All records of the exact costs."""
    records: list[dict[str, Any]] = results("cost_exact")["records"]
    return records


def row_of(record: dict[str, Any]) -> Row:
    """What a record of the exact costs is of, beside its model."""
    return Row(record["method"], record["prompts"], record["experts"])


@lru_cache
def _by_row() -> dict[tuple[str, Row], dict[str, Any]]:
    return {(each["model"], row_of(each)): each for each in exact_records()}


def exact_row(model: str, method: str, prompts: int | None = None, experts: int | None = None) -> dict[str, Any]:
    """One record of the exact costs; empty if a model has no such row."""
    return _by_row().get((model, Row(method, prompts, experts)), {})


def times(file: str = "times_cpu") -> dict[str, dict[str, Any]]:
    """Groups of a run of `times.py`; none where it has not been run."""
    found: dict[str, dict[str, Any]] = results(file).get("cells", {})
    return found


def time_ratio(group: str, kind: str, of: str, to: str, file: str = "times_cpu") -> float | None:
    """Minimum seconds of a row over those of another; None where either was not timed."""
    rows = times(file).get(group, {})
    one, other = (rows.get(name, {}).get(kind) for name in (of, to))
    return None if one is None or other is None else one["min_s"] / other["min_s"]
