# SPDX-License-Identifier: Apache-2.0
"""Accuracy against trained parameters: which methods are one method in several sizes, and what was found of them.

A curve's sizes come from two files of one budget: `learning_text.py` has each method in the size of its table,
`learning_text.py --sizes` the others.
"""

from dataclasses import dataclass

from .markdown import deviation, table
from .reading import results

# Methods by curve, the smallest first, with the prompts that a token meets.
CURVES: dict[str, dict[str, int]] = {
    "head only": {"head": 0},
    "LoRA on queries and values": {"lora-r1-qv": 0},
    "LoRA on all of attention": dict.fromkeys(("lora-r1", "lora-r2", "lora-r4", "lora", "lora-r16"), 0),
    "deep prompts": {"static-5": 5, "static": 10, "static-20": 20, "static-50": 50, "static-100": 100},
    "MEPT by sample": {"mept-sample-2x4": 2, "mept-sample-5x4": 5, "mept-sample": 10, "mept-sample-20x4": 20},
    "MEPT by token": {"mept-token-2x4": 4, "mept-token-5x4": 10, "mept-token": 20, "mept-token-20x4": 40},
    "PEFT prompt tuning": {"prompt": 20},
    "PEFT prefix tuning": {"prefix": 20},
}


@dataclass(frozen=True)
class Size:
    """One method in one size; `deviation` and `seconds` where they were measured."""

    curve: str
    method: str
    prompts: int
    trained: int
    score: float
    deviation: float | None
    seeds: int
    lr: float
    seconds: float | None


def sizes(name: str) -> list[Size]:
    """All sizes of a benchmark that have results, curve by curve."""
    files = [results(name), results(f"{name}_sizes_3_epochs")]
    found = {method: row for file in files for method, row in file.get("summary", {}).items()}
    seconds = {method: time for file in files for method, time in file.get("step_seconds", {}).items()}
    return [
        Size(
            curve,
            method,
            prompts,
            found[method]["trainable"],
            found[method]["mean"],
            found[method]["sd"],
            len(found[method]["test"]),
            found[method]["lr"],
            seconds.get(method),
        )
        for curve, methods in CURVES.items()
        for method, prompts in methods.items()
        if method in found
    ]


def size_table(name: str) -> str:
    """Sizes in the order of their trained parameters."""
    rows = [
        [
            each.curve,
            f"{each.trained:,}",
            str(each.prompts or ""),
            f"{each.score:.3f}",
            deviation(each.deviation),
            str(each.seeds),
            f"{each.lr:g}",
            "" if each.seconds is None else f"{each.seconds:.2g} s",
        ]
        for each in sorted(sizes(name), key=lambda each: (each.trained, each.curve))
    ]
    headings = ["method", "trained", "prompts met", "test accuracy", "over seeds", "seeds", "rate", "a step"]
    return table(headings, rows)
