# SPDX-License-Identifier: Apache-2.0
"""What the papers claim, as far as it can be tested at this size, beside what was found in the committed results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .reading import NAMES, results

WITHIN = "within the spread"


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and one comparison that tests it.

    Attributes:
        paper: the method that the paper is about.
        says: what the paper says, with its own figure where it gives one.
        task: what was compared on.
        budget: what every method was trained on there.
        found: both figures; empty where they were not measured.
        verdict: "holds", "does not hold", or that the difference is within the spread of seeds.
    """

    paper: str
    says: str
    task: str
    budget: str
    found: str
    verdict: str


def verdict(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Whether `one` scores more than `other`, by two standard errors of the difference of their means over seeds."""
    if None in (one["sd"], other["sd"]):
        return "one seed says nothing"
    error = math.sqrt(sum(row["sd"] ** 2 / len(row["test"]) for row in (one, other)))
    difference = one["mean"] - other["mean"]
    if abs(difference) <= 2 * error:
        return WITHIN
    return "holds" if difference > 0 else "does not hold"


def scores(paper: str, says: str, file: str, method: str, *others: str) -> Claim:
    """That a method scores more than the best of some others."""
    summary, where = results(file).get("summary", {}), (TASKS[file], budget(file))
    if method not in summary or any(other not in summary for other in others):
        return Claim(paper, says, *where, "", "not measured yet")
    best = max(others, key=lambda other: float(summary[other]["mean"]))
    one, other = summary[method], summary[best]
    shown = f"{_name(method)} {one['mean']:.3f}, {_name(best)} {other['mean']:.3f}"
    return Claim(paper, says, *where, shown, verdict(one, other))


def sizes(paper: str, says: str, file: str, method: str, other: str) -> Claim:
    """That a method trains fewer parameters than another, the head that both train left aside."""
    summary, where = results(file).get("summary", {}), (TASKS[file], budget(file))
    if any(name not in summary for name in (method, other, "head")):
        return Claim(paper, says, *where, "", "not measured yet")
    one, more = (summary[name]["trainable"] - summary["head"]["trainable"] for name in (method, other))
    shown = f"{_name(method)} {one:,}, {_name(other)} {more:,}"
    return Claim(paper, says, *where, shown, "holds" if one < more else "does not hold")


def budget(file: str) -> str:
    """What each method was trained on in a results file: samples and epochs; empty where there are no results."""
    settings = results(file).get("config")
    if settings is None:
        return ""
    kind = "texts" if "texts" in settings else "images"
    # Once a rate is chosen, images to choose by are there to train on.
    samples = settings[kind].get("both", settings[kind]["train"])
    epochs = settings["budget"]["epochs"]
    return f"{samples:,} {kind}, {epochs} epoch{'s' * (epochs > 1)}"


TASKS = {
    "learning_text": "sentiment",
    "learning_text_mixture": "four text tasks",
    "learning_causal": "sentiment, by generation",
    "learning_mixture": "six instructions",
    "learning_vision_cifar10": "CIFAR-10",
    "learning_vision_mnist": "MNIST",
    "learning_vision_mnist_20_epochs": "MNIST",
    "learning_experts": "digits on photos",
}


def _name(method: str) -> str:
    return NAMES.get(method, method)


def claims() -> Iterator[Claim]:
    """All claims, paper by paper."""
    images = ("learning_vision_cifar10", "learning_vision_mnist", "learning_vision_mnist_20_epochs")
    for file in images:
        yield scores("VAPT", "beats full fine-tuning (by 7.34 points on VTAB-1k)", file, "vapt", "full")
    for file in images:
        yield scores("VAPT", "beats VPT-Deep", file, "vapt", "vpt-deep")
    yield sizes("VAPT", "trains fewer parameters than VPT-Deep", images[0], "vapt", "vpt-deep")
    for file, method in (
        ("learning_text", "mept-sample"),
        ("learning_text_mixture", "mept-sample"),
        ("learning_causal", "mept-sample-inputs"),
    ):
        says = "beats prompt methods (by 1.94 points on SuperGLUE) with fewer active prompts: 10 beside 20"
        yield scores("MEPT", says, file, method, "prompt", "prefix")
    yield scores("MEPT", says, "learning_mixture", "mept-sample", "prompt")
    for file in ("learning_text_mixture", "learning_mixture"):
        yield scores("MEPT", "beats P-Tuning v2, which is one deep prompt", file, "mept-sample", "static")
    yield scores(
        "pMoE",
        "beats its best expert",
        "learning_experts",
        "pmoe-token",
        *(
            f"{tuner} {backbone}"
            for tuner in ("head", "vpt-deep", "vapt")
            for backbone in ("dinov2", "digits", "photos")
        ),
    )
    yield scores("pMoE", "taking the dispatcher away costs accuracy", "learning_experts", "pmoe-token", "pmoe-none")
