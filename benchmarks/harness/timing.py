# SPDX-License-Identifier: Apache-2.0
"""Runs that take turns within one process, and what is timed: steps, forwards, generation, attaching, saving, loading.

A run is a function that does its work once and returns seconds by what it has timed.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CompileConfig

from peft_promptmoe.engine.model_hooks import prompt_layers

Batch = dict[str, Tensor]
Run = Callable[[], dict[str, float]]
Times = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Device:
    """Where and how models run: `bf16` frozen weights under autocast, `compiled` by torch."""

    name: str = "cpu"
    bf16: bool = False
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.name, torch.bfloat16) if self.bf16 else nullcontext()

    def ready(self, model: nn.Module) -> Callable[..., Any]:
        return torch.compile(model) if self.compiled else model

    def now(self) -> float:
        """Seconds, once everything that was asked of the device is done."""
        if self.name == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def interleaved(runs: dict[str, Run], repeats: int, warm_up: int, desc: str) -> Times:
    """Minimum and median seconds of each run and kind, the runs taking turns; the first `warm_up` do not count."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for turn in tqdm(range(-warm_up, repeats), desc=desc):
        for name, run in runs.items():
            for kind, seconds in run().items():
                if turn >= 0:
                    times[name].setdefault(kind, []).append(seconds)
    return {
        name: {
            kind: {"min_s": round(min(found), 6), "median_s": round(statistics.median(found), 6)}
            for kind, found in kinds.items()
        }
        for name, kinds in times.items()
    }


def step(model: nn.Module, inputs: Batch, device: Device) -> Run:
    """One forward and backward, without the optimiser's part."""
    ready = device.ready(model)

    def run() -> dict[str, float]:
        model.train()
        start = device.now()
        with device.autocast():
            loss = ready(**inputs).loss
        loss.backward()
        seconds = device.now() - start
        model.zero_grad()
        return {"step": seconds}

    return run


def forward(model: nn.Module, inputs: Batch, device: Device) -> Run:
    """One forward in evaluation, without labels."""
    ready = device.ready(model)
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}

    def run() -> dict[str, float]:
        model.eval()
        start = device.now()
        with torch.no_grad(), device.autocast():
            ready(**inputs)
        return {"forward": device.now() - start}

    return run


def generation(model: Any, ids: Tensor, tokens: int, device: Device) -> Run:
    """Greedy generation with a cache: of its first token, and seconds for each token more.

    On a compiled device the cache is static, whose steps transformers compiles.
    """
    model.eval()
    if device.compiled:
        model.generation_config.cache_implementation = "static"
        model.generation_config.compile_config = CompileConfig(dynamic=False)
        model.generation_config.compile_config._compile_all_devices = True  # or a CPU's steps stay eager

    def generate(count: int) -> float:
        start = device.now()
        with torch.no_grad(), device.autocast():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
        return device.now() - start

    def run() -> dict[str, float]:
        first, all_of_them = generate(1), generate(1 + tokens)
        return {"prefill": first, "decode": (all_of_them - first) / tokens}

    return run


def life(base: nn.Module, config: Any, device: Device) -> Run:
    """Attaching a new adapter to a model, saving it, and loading it into another copy of that model."""

    def run() -> dict[str, float]:
        one, other = copy.deepcopy(base), copy.deepcopy(base)
        start = device.now()
        model = get_peft_model(one, copy.deepcopy(config))
        attached = device.now()
        with tempfile.TemporaryDirectory() as folder:
            before = device.now()
            model.save_pretrained(folder)
            saved = device.now()
            PeftModel.from_pretrained(other, folder)
            loaded = device.now()
        return {"attach": attached - start, "save": saved - before, "load": loaded - saved}

    return run


def importing() -> dict[str, float]:
    """Seconds that `import peft_promptmoe` takes in a new process which has imported peft, and those of peft."""
    code = (
        "import time; start = time.perf_counter(); import peft; middle = time.perf_counter(); import peft_promptmoe; "
        "print(middle - start, time.perf_counter() - middle)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    peft, own = map(float, done.stdout.split())
    return {"peft": peft, "import": own}


def peak_bytes(model: nn.Module, run: Run) -> int:
    """Most GPU memory in a training step: this model's parameters and whatever the step adds to them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return held + torch.cuda.max_memory_allocated() - before


# -- the textbook form of deep prompts ----------------------------------------------------------------------------


def prepended(model: nn.Module) -> nn.Module:
    """Make a prompted model pass its prompts through its blocks as tokens: put in front of each, dropped behind it."""
    for layer in prompt_layers(model):
        block: Any = layer.site.block
        layer.detach()
        block.add_module("prompts", layer)
        block.register_forward_pre_hook(_put_in)
        block.register_forward_hook(_drop)
    return model


def _put_in(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    rows = block.prompts.rows("default", args[0], None, None).to(args[0].dtype)
    return torch.cat([rows.expand(args[0].shape[0], -1, -1), args[0]], dim=1), *args[1:]


def _drop(block: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output[:, -(args[0].shape[1] - block.prompts.prompt_config["default"].num_virtual_tokens) :]


def check_same(one: nn.Module, other: nn.Module, inputs: Batch) -> None:
    """Two forms of the same prompts that compute different things are not worth timing."""
    with torch.no_grad():
        expected, found = (model.eval()(**inputs).logits for model in (one, other))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
