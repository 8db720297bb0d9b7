# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can tell of a training step: whether it waits for the device, and which kernels it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .timing import Batch, Device

FUSED = re.compile(r"_scaled_dot_product_(flash|cudnn|efficient)\w*_attention\w*$|flash_attn\w*fwd|flex_attention")
MATH = re.compile(r"_scaled_dot_product_attention_math$|_safe_softmax$")
BACKWARD = re.compile("backward")


def train_once(model: nn.Module, inputs: Batch, device: Device) -> None:
    """One forward and backward; what it allocates is freed again."""
    model.train()
    with device.autocast():
        loss = model(**inputs).loss
    loss.backward()
    model.zero_grad()


def synchronisation(model: nn.Module, inputs: Batch, device: Device) -> str:
    """ "none", or what a training step waits for the device for; the first step, which looks at more, does not count.

    On a CPU there is nothing to wait for, and the step is only run.
    """
    train_once(model, inputs, device)
    if device.name != "cuda":
        train_once(model, inputs, device)
        return "none"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_once(model, inputs, device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.zero_grad()
    return "none"


def attention_kernels(model: nn.Module, inputs: Batch, device: Device) -> dict[str, Any]:
    """Calls of fused attention in the forward of a training step by name, and calls of the unfused form."""
    train_once(model, inputs, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.name == "cuda" else [])]
    with profile(activities=activities) as profiler:
        train_once(model, inputs, device)
        device.now()
    calls = {event.key.removeprefix("aten::"): event.count for event in profiler.key_averages()}
    named: Callable[[re.Pattern[str]], dict[str, int]] = lambda pattern: {  # noqa: E731
        name: count for name, count in calls.items() if pattern.search(name) and not BACKWARD.search(name)
    }
    return {"fused": named(FUSED), "unfused": sum(named(MATH).values())}
