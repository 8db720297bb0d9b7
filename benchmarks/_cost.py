# SPDX-License-Identifier: Apache-2.0
"""How the cost benchmarks count and time: FLOPs, saved bytes, training steps, tables of ratios."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import peft_promptmoe

Model = Callable[[], nn.Module]


def build(make: Model, config: Any) -> nn.Module:
    """The model with this config's adapter; None is the frozen base model."""
    model = make()
    return model.requires_grad_(False) if config is None else get_peft_model(model, config)


def flops(model: nn.Module, inputs: dict[str, Tensor], train: bool) -> int:
    """FLOPs of one forward, or of a forward and backward."""
    model.train(train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        # no_grad alone does not do: views of a parameter still ask for gradients there, on which the counter fails.
        parameter.requires_grad_(train)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        loss = model(**inputs).loss
        if train and loss.requires_grad:
            loss.backward()
    for parameter in trained:
        parameter.requires_grad_(True)
    return counter.get_total_flops()


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor], beside: Iterable[nn.Module] = ()) -> int:
    """Bytes that one training forward keeps for its backward pass, parameters aside; shared storage counts once.

    `beside` are models that it runs and that are no part of it.
    """
    model.train()
    own = {parameter.untyped_storage()._cdata for part in (model, *beside) for parameter in part.parameters()}
    seen: dict[int, int] = {}
    kept = []  # keeps storages alive, so that none is counted under the number of a freed one

    def pack(tensor: Tensor) -> None:
        # Nothing is handed back: a node that kept its own output would hold the whole graph in memory for good.
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
            kept.append(storage)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        loss = model(**inputs).loss
    del loss
    return sum(seen.values())


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_method = {row["method"]: row for row in rows}
    base, lora = by_method["base"], by_method["lora_r8"]
    for row in rows:
        if "forward_flops" in row:
            row["forward_vs_base"] = row["forward_flops"] / base["forward_flops"]
            row["train_vs_lora"] = row["train_flops"] / lora["train_flops"]
        row["saved_vs_lora"] = row["saved_bytes"] / lora["saved_bytes"]
    return rows


def interleaved(runs: dict[str, Callable[[], float]], repeats: int, desc: str) -> dict[str, dict[str, float]]:
    """Minimum and median seconds of each run, the runs taking turns; the first turn is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(repeats + 1), desc=desc, leave=False):
        for name, run in runs.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    return {name: {"min_s": min(found), "median_s": statistics.median(found)} for name, found in times.items()}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], float]:
    """A run of one forward and backward, which returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        model(**inputs).loss.backward()
        seconds = time.perf_counter() - start
        model.zero_grad()
        return seconds

    return run


def relative(times: dict[str, dict[str, float]], to: str) -> dict[str, dict[str, float]]:
    return {name: {**row, f"min_vs_{to}": row["min_s"] / times[to]["min_s"]} for name, row in times.items()}


def show_exact(rows: list[dict[str, Any]]) -> None:
    print(f"{'model':12}{'method':22}{'trainable':>11}{'forward':>9}{'train/LoRA':>12}{'saved/LoRA':>12}")
    for row in rows:
        forward, train = row.get("forward_vs_base", float("nan")), row.get("train_vs_lora", float("nan"))
        print(
            f"{row['model']:12}{row['method']:22}{row['trainable']:11,}{forward:9.4f}{train:12.4f}"
            f"{row['saved_vs_lora']:12.4f}"
        )


def show_times(kind: str, times: dict[str, dict[str, float]]) -> None:
    for name, row in times.items():
        print(f"{kind:8}{name:22}" + "".join(f"{key} {value:.4f}   " for key, value in row.items()))


def write(result: dict[str, Any], path: Path, *more: Any) -> None:
    """Write the figures with the versions and the machine they are from; `more` modules have a version, too."""
    modules = (torch, transformers, peft, peft_promptmoe, *more)
    result = {
        **result,
        "versions": {module.__name__: module.__version__ for module in modules},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
