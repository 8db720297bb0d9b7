# SPDX-License-Identifier: Apache-2.0
"""One plain training loop for every method compared, and a JSON file in which finished cells are kept."""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from .records import provenance

HEAD_NAMES = ("classifier", "score", "head", "pmoe_fusion", "flow_head", "depth_head")


class Split(Protocol):
    """Samples to train on or to predict, with `labels` (N,)."""

    labels: Tensor

    def __len__(self) -> int: ...

    def length(self, index: int) -> int:
        """Tokens of a sample; samples of like length share a batch."""

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        """The model's inputs, and `labels`."""


class Recipe(Protocol):
    """How trained tensors are moved, where a method is compared with a recipe of its own."""

    def optimizer(self, model: nn.Module, lr: float, budget: "Budget") -> torch.optim.Optimizer: ...

    def factor(self, step: int, steps: int, budget: "Budget") -> float:
        """Share of the learning rate in a step."""

    clip: float  # of the gradients' norm


@dataclass(frozen=True)
class Budget:
    """What every method gets alike."""

    epochs: int = 3
    batch_size: int = 16
    head_lr: float = 3e-3
    warmup: float = 0.06
    bf16: bool = True

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def batches(data: Split, size: int, generator: torch.Generator) -> list[list[int]]:
    """A random order of random batches; samples of like length share one, which saves texts a third of the padding."""
    order = torch.randperm(len(data), generator=generator).tolist()
    pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
    order = [i for pool in pools for i in sorted(pool, key=data.length)]
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]


def parameter_groups(model: nn.Module, lr: float, head_lr: float) -> list[dict[str, Any]]:
    """The method's tensors at `lr`, the head at `head_lr`: one rate for both would favour some methods."""
    head: list[nn.Parameter] = []
    method: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if any(part in HEAD_NAMES for part in name.split(".")) else method).append(parameter)
    if not method:  # head-only: its learning rate is the one that is searched
        return [{"params": head, "lr": lr}]
    return [{"params": method, "lr": lr}, {"params": head, "lr": head_lr}]


class AdamW:
    """The recipe of every comparison: AdamW, a head at its own rate, a linear rise and fall."""

    clip = 1.0

    def optimizer(self, model: nn.Module, lr: float, budget: Budget) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(model, lr, budget.head_lr), weight_decay=0.0)

    def factor(self, step: int, steps: int, budget: Budget) -> float:
        return _linear(step, steps, budget.warmup)


ADAMW = AdamW()


def train(
    model: nn.Module, data: Split, lr: float, seed: int, budget: Budget, label: str, recipe: Recipe = ADAMW
) -> float:
    """Train what is trainable in `model` and return the mean loss of the last 50 steps."""
    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(data) / budget.batch_size) * budget.epochs
    optimizer = recipe.optimizer(model, lr, budget)
    schedule = LambdaLR(optimizer, lambda step: recipe.factor(step, steps, budget))
    trainable = [p for p in model.parameters() if p.requires_grad]
    device = device_of(model)
    losses: list[Tensor] = []  # on the device, which a step need not wait for
    model.train()
    order = (chosen for _ in range(budget.epochs) for chosen in batches(data, budget.batch_size, generator))
    for chosen in tqdm(order, total=steps, desc=label, mininterval=5.0):
        batch = {name: value.to(device) for name, value in data.batch(chosen).items()}
        with budget.autocast(device):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses[-50:]).double().mean().item()


def train_cell(
    model: nn.Module, data: Split, lr: float, seed: int, budget: Budget, label: str, recipe: Recipe = ADAMW
) -> dict[str, Any]:
    """Train as `train` does, and return what a cell keeps of it."""
    with Stopwatch() as watch:
        loss = train(model, data, lr, seed, budget, label, recipe)
    return {
        "train_loss": round(loss, 4),
        "train_seconds": round(watch.seconds, 1),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _linear(step: int, steps: int, warmup: float) -> float:
    rise = max(1, int(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def prediction_order(data: Split) -> list[int]:
    """The order in which `predict` goes through the samples: short ones first, which saves padding."""
    return sorted(range(len(data)), key=data.length)


def predict(model: nn.Module, data: Split, budget: Budget) -> Tensor:
    """Predicted class of every sample, (N,)."""
    return predict_logits(model, data, budget).argmax(-1)


@torch.no_grad()
def predict_logits(model: nn.Module, data: Split, budget: Budget) -> Tensor:
    """Logits of every sample, (N, C)."""
    model.eval()
    device, found = device_of(model), dict[int, Tensor]()
    order = prediction_order(data)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = {name: value.to(device) for name, value in data.batch(chosen).items() if name != "labels"}
        with budget.autocast(device):
            found |= zip(chosen, model(**batch).logits.float().cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(order))])


class Results:
    """Cells by key in one JSON file, written after every cell, so that a stopped run goes on where it was."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"config": config, "cells": {}}
        if self.data["config"] != config:
            raise SystemExit(
                f"{path} holds results of another configuration ({self.data['config']}): name a new file."
            )

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        return self.data["cells"]

    @property
    def summaries(self) -> dict[str, dict[str, Any]]:
        return self.data.setdefault("summary", {})

    def cell(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A cell, which is made now unless an earlier run finished it."""
        if key not in self.cells:
            self.cells[key] = make()
            self.data["made_with"] = provenance()
            self.save()
        return self.cells[key]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")
        os.replace(partial, self.path)


class Stopwatch:
    """`with Stopwatch() as watch: ...` then `watch.seconds`."""

    seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
