# SPDX-License-Identifier: Apache-2.0
"""What training and decoding take on a GPU, beside LoRA r8 and PEFT's prompt and prefix tuning, in some minutes.

    python benchmarks/gpu.py                            # everything; writes results/gpu_NAME-OF-THE-DEVICE.json
    python benchmarks/gpu.py --groups sync kernels      # some groups only
    python benchmarks/gpu.py --seconds 200              # starts nothing more after 200 seconds
    python benchmarks/gpu.py --small --results t.json   # tiny models, on a CPU too, to see that it works

Models are frozen bf16 weights under bf16 autocast, with adapters in float32; their values are random. The methods of a
group take turns within one process; compare times by their ratio to a row of the same group. A cell is written as soon
as it is there and not run again. Compiled groups have fewer layers than the model, which their name says, because
compiling takes time by the layer.

    sync        whether a training step ever waits for the device
    kernels     which attention kernels a training step runs
    step        seconds of a training step, and the most memory that it takes
    compiled    the same, compiled by torch
    decode      seconds for each token, with the cache that transformers takes by default
    static      the same with a static cache, for which transformers compiles the forward
    long        training steps on long texts, with and without padding
"""

from __future__ import annotations

import argparse
import gc
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn

from harness.gpu import attention_kernels, synchronisation
from harness.methods import build, share_frozen
from harness.reading import FOLDER
from harness.refusals import refusal
from harness.rows import Row
from harness.shapes import SHAPES, quiet
from harness.timing import Batch, Device, Run, generation, interleaved, peak_bytes, step
from harness.training import Results

LORA, BASE = Row("lora_r8"), Row("base")
MEPT = (Row("mept_sample", 20, 4), Row("mept_token", 20, 4), Row("mept_token", 20, 64))
TEXT = (LORA, Row("prompt_tuning", 20), Row("prefix_tuning", 20), Row("static", 20, 1), *MEPT)
IMAGES = (LORA, Row("vpt_deep", 10), Row("vapt", 10), Row("mept_sample", 10, 4), Row("mept_token", 10, 4))
ROWS = {"vit-b16-hf": IMAGES, "llama-1b": TEXT}
FEW = {"vit-b16-hf": (LORA, IMAGES[2], IMAGES[4]), "llama-1b": (LORA, MEPT[0], MEPT[1])}
DECODED = (BASE, LORA, Row("static", 20, 1), *MEPT)
# Samples of a batch, tokens of a text.
SIZE = {"vit-b16-hf": (64, None), "llama-1b": (4, 512)}
COMPILED_DEPTH, LONG_DEPTH = 4, 2
LONG = (512, 2048, 8192)


@dataclass(frozen=True)
class Setting:
    """What all groups of a run have in common; `small` models are for trying the script."""

    device: Device
    repeats: int
    tokens: int
    small: bool

    def depth(self, name: str, at_most: int | None = None) -> int:
        depth = 2 if self.small else SHAPES[name].depth
        return depth if at_most is None else min(depth, at_most)

    def models(self, name: str, rows: tuple[Row, ...], depth: int) -> dict[str, nn.Module]:
        """A model of each row, on the same frozen weights."""
        frozen: dict[str, torch.Tensor] = {}
        made = {}
        for row in rows:
            torch.manual_seed(0)
            with torch.device(self.device.name):
                made[str(row)] = build(SHAPES[name], row, depth, self.small, self.device.dtype)
            share_frozen(made[str(row)], frozen)
        return made

    def inputs(self, name: str, batch: int | None = None, length: int | None = None) -> Batch:
        batch, length = (2, None) if self.small else (batch or SIZE[name][0], length or SIZE[name][1])
        torch.manual_seed(0)
        with torch.device(self.device.name):
            return SHAPES[name].inputs(batch, self.small, length)


Cell = dict[str, Any]
Cells = Iterator[tuple[str, Cell]]


def synchronisations(setting: Setting) -> Cells:
    for name, rows in ROWS.items():
        for row, model in setting.models(name, (BASE_TRAINED[name], *rows), setting.depth(name, LONG_DEPTH)).items():
            yield f"{name} {row}", {"waits": synchronisation(model, setting.inputs(name), setting.device)}


def kernels(setting: Setting) -> Cells:
    for name, rows in ROWS.items():
        depth = setting.depth(name, LONG_DEPTH)
        for row, model in setting.models(name, (BASE_TRAINED[name], *rows), depth).items():
            found = attention_kernels(model, setting.inputs(name), setting.device)
            yield f"{name} {row}", {"layers": depth, **found}


def steps(setting: Setting) -> Cells:
    for name, rows in ROWS.items():
        yield name, timed_steps(setting, setting.models(name, rows, setting.depth(name)), setting.inputs(name), name)


def timed_steps(setting: Setting, made: dict[str, nn.Module], inputs: Batch, label: str) -> Cell:
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for row, model in made.items():
        run = step(model, inputs, setting.device)
        if reason := refusal(row.rsplit("_", 1)[0], run):
            refused[row] = reason
        else:
            runs[row] = run
    # What a first forward sets up makes torch compile the second one anew.
    found: Cell = dict(interleaved(runs, setting.repeats, 3, label))
    if setting.device.name == "cuda":
        for row, run in runs.items():
            found[row]["peak_bytes"] = peak_bytes(made[row], run)
    return found | ({"refused": refused} if refused else {})


def compiled_steps(setting: Setting) -> Cells:
    device = Device(setting.device.name, setting.device.bf16, compiled=True)
    setting = Setting(device, setting.repeats, setting.tokens, setting.small)
    for name, rows in FEW.items():
        depth = setting.depth(name, COMPILED_DEPTH)
        made = setting.models(name, rows, depth)
        yield f"{name} {depth} layers", timed_steps(setting, made, setting.inputs(name), f"{name} compiled")


def decoding(setting: Setting) -> Cells:
    yield "llama-1b", timed_decoding(setting, DECODED, setting.depth("llama-1b"))


def static_decoding(setting: Setting) -> Cells:
    device = Device(setting.device.name, setting.device.bf16, compiled=True)
    setting = Setting(device, setting.repeats, setting.tokens, setting.small)
    depth = setting.depth("llama-1b", COMPILED_DEPTH)
    yield f"llama-1b {depth} layers", timed_decoding(setting, (BASE, LORA, MEPT[0], MEPT[1]), depth)


def timed_decoding(setting: Setting, rows: tuple[Row, ...], depth: int) -> Cell:
    ids = setting.inputs("llama-1b", batch=8, length=64)["input_ids"]
    runs = {}
    for row, model in setting.models("llama-1b", rows, depth).items():
        model.generation_config.eos_token_id = None
        runs[row] = generation(model, ids, setting.tokens, setting.device)
    warm_up = 2 if setting.device.compiled else 1
    return dict(interleaved(runs, max(1, setting.repeats // 4), warm_up, "decoding"))


def long_texts(setting: Setting) -> Cells:
    depth = setting.depth("llama-1b", LONG_DEPTH)
    rows = (LORA, Row("prefix_tuning", 20), MEPT[0], MEPT[1])
    made = setting.models("llama-1b", rows, depth)
    for length in LONG:
        inputs = setting.inputs("llama-1b", batch=max(1, 8192 // length), length=length)
        yield f"llama-1b {length} tokens", timed_steps(setting, made, inputs, f"{length} tokens")
        mask = torch.ones_like(inputs["input_ids"])
        mask[:, : mask.shape[1] // 8] = 0
        padded = {**inputs, "attention_mask": mask}
        yield f"llama-1b {length} tokens, padded", timed_steps(setting, made, padded, f"{length} tokens, padded")


# What the frozen model itself does in a training step: without a head that trains it has no backward pass.
BASE_TRAINED = {"vit-b16-hf": Row("head"), "llama-1b": Row("full")}
GROUPS = {
    "sync": synchronisations,
    "kernels": kernels,
    "step": steps,
    "decode": decoding,
    "compiled": compiled_steps,
    "static": static_decoding,
    "long": long_texts,
}


def parse_args(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seconds", type=float, default=450.0, help="after so many seconds no further cell starts")
    parser.add_argument("--repeats", type=int, default=16, help="turns that count; three more warm up")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are decoded after the first")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--results", type=Path, help="JSON file (default: benchmarks/results/gpu_DEVICE.json)")
    return parser.parse_args(given)


def main(args: argparse.Namespace) -> None:
    quiet()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.small:
        raise SystemExit("There is no CUDA device. Try the script on a CPU with --small.")
    setting = Setting(Device("cuda" if on_gpu else "cpu", bf16=True), args.repeats, args.tokens, args.small)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    path = args.results or FOLDER / f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
    results = Results(path, asdict(setting))
    until = time.monotonic() + args.seconds
    # Models of one class share compiled code, and beyond the default limit of variants torch falls back to eager.
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        for group in args.groups:
            try:
                run_group(group, setting, results, until)
            except Exception as error:  # one group's failure must not cost the others' figures
                traceback.print_exc()
                results.data.setdefault("failed", {})[group] = f"{type(error).__name__}: {error}"
                results.save()
    if failed := results.data.get("failed"):
        raise SystemExit(f"Failed: {', '.join(failed)}")


def run_group(group: str, setting: Setting, results: Results, until: float) -> None:
    done = results.data.setdefault("done", [])
    if group in done:
        return
    results.data.get("failed", {}).pop(group, None)
    start = time.monotonic()
    for key, cell in GROUPS[group](setting):
        results.cell(f"{group} {key}", partial(dict, cell))
        print(f"{time.monotonic() - start:6.1f} s  {group} {key}  {shown(cell)}", flush=True)
        if time.monotonic() > until:
            print(f"The time is over during {group!r}: start the script again to go on.")
            return
    done.append(group)
    results.save()
    gc.collect()
    if setting.device.name == "cuda":
        torch.cuda.empty_cache()


def shown(cell: Cell) -> str:
    return "; ".join(f"{row} {shown_times(value)}" for row, value in cell.items())


def shown_times(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return " ".join(
        f"{kind} {part['min_s'] * 1e3:.2f} ms" if isinstance(part, dict) else f"{kind} {part}"
        for kind, part in value.items()
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main(parse_args())
