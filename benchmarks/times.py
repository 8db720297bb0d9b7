# SPDX-License-Identifier: Apache-2.0
"""Times: training steps, forwards, generation, attaching, saving, loading and importing, method by method.

    python benchmarks/times.py                                        # CPU, float32
    python benchmarks/times.py --device cuda --bf16 --compile         # a GPU
    python benchmarks/times.py --groups "bert-base step" --repeats 3  # one group only
    python benchmarks/times.py --small --repeats 1 --results t.json   # tiny models, to see that it works

The methods of a group take turns within one process, so what slows the machine slows them all; of the turns the
minimum and the median are kept. Compare times by their ratio to a row of the same group. A finished group is in the
JSON file and not run again. Models have random weights: a step takes as long with them as with trained ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn

from harness.counting import graphs
from harness.methods import build, config, frozen_backbones, share_frozen
from harness.reading import FOLDER
from harness.refusals import refusal
from harness.rows import DISPATCHERS, Row
from harness.shapes import SHAPES, Shape, quiet
from harness.timing import (
    Batch,
    Device,
    Run,
    Times,
    check_same,
    forward,
    generation,
    importing,
    interleaved,
    life,
    peak_bytes,
    prepended,
    step,
)
from harness.training import Results
from peft_promptmoe import cached_prompts

FROZEN = (Row("base"), Row("lora_r8"))
BASELINES = (Row("head"), Row("full"), Row("lora_r8"))
TEXT = (
    *(Row(method, 20) for method in ("prompt_tuning", "prefix_tuning", "p_tuning")),
    Row("static", 20, 1),
    Row("static", 50, 1),
    *(Row(method, 20, experts) for method in ("mept_sample", "mept_token") for experts in (4, 64)),
)
IMAGES = (
    *(Row(method, 10) for method in ("vpt_deep", "vapt")),
    *(Row(method, 10, 4) for method in ("mept_sample", "mept_token")),
    *(Row(method, 50) for method in ("vpt_deep", "vpt_tokens", "vapt", "vapt_tokens")),
    Row("mept_sample", 50, 4),
)
EXPERTS = tuple(Row(f"pmoe_{dispatcher}", 10, 2) for dispatcher in DISPATCHERS)
LANGUAGE = (*FROZEN, *(row for row in TEXT if row != Row("static", 50, 1)))
# A decoding step takes minutes to compile.
COMPILED_LANGUAGE = (*FROZEN, Row("static", 20, 1), *(row for row in TEXT if row.method == "mept_token"))
MANY = tuple(Row("mept_token", 10, experts) for experts in (4, 16, 64, 256))
ADAPTERS = {
    "bert-base": (Row("lora_r8"), Row("prompt_tuning", 20), *TEXT[3:4], *TEXT[5:]),
    "vit-b16-hf": (Row("lora_r8"), *IMAGES[:3]),
}
# Other forms of the same prompts: the textbook's, as tokens of every block; rows made once, for serving.
AS_TOKENS = {"vpt_tokens": "vpt_deep", "vapt_tokens": "vapt"}
CACHED = {"static_cached": "static", "vpt_cached": "vpt_deep"}
FORMS = AS_TOKENS | CACHED
BATCH = {"bert-base": 8, "smollm2": 4, "vit-b16-hf": 4, "vit-b16-timm": 4}


@dataclass(frozen=True)
class Setting:
    """What all groups of a run have in common; `small` models are for trying the script."""

    device: Device
    repeats: int
    batch: dict[str, int]
    tokens: int
    small: bool

    def depth(self, shape: Shape) -> int:
        return 2 if self.small else shape.depth

    def build(self, shape: Shape, row: Row, frozen: Frozen | None = None) -> nn.Module:
        """A row's model; those that are given the same `frozen` hold the same frozen weights, in the same memory."""
        torch.manual_seed(0)  # rows of the same prompts in two forms have the same values
        row = row._replace(method=FORMS.get(row.method, row.method))
        with torch.device(self.device.name):
            model = build(shape, row, self.depth(shape), self.small, self.device.dtype)
        if frozen is not None:
            share_frozen(model, frozen)
        return model

    def timed(self, runs: dict[str, Run], desc: str) -> Times:
        # What a first forward sets up makes torch compile the second one anew.
        return interleaved(runs, self.repeats, 3 if self.device.compiled else 1, desc)

    def inputs(self, name: str) -> Batch:
        torch.manual_seed(0)
        with torch.device(self.device.name):
            return SHAPES[name].inputs(self.batch[name], self.small)


Group = Callable[[Setting], dict[str, Any]]
Frozen = dict[str, torch.Tensor]


def models(name: str, kind: Callable[..., Run], rows: tuple[Row, ...]) -> Group:
    """Training steps or forwards of each row on one model; on a GPU also the memory that a step takes."""

    def group(setting: Setting) -> dict[str, Any]:
        made: dict[str, nn.Module] = {}
        frozen: Frozen = {}
        runs: dict[str, Run] = {}
        refused: dict[str, str] = {}
        inputs = setting.inputs(name)
        with ExitStack() as stack:
            for row in rows:
                model = setting.build(SHAPES[name], row, frozen)
                if row.method in AS_TOKENS:
                    prepended(model)
                if row.method in CACHED:
                    stack.enter_context(cached_prompts(model))
                if row.method in FORMS and not setting.device.bf16:
                    check_same(made[str(row._replace(method=FORMS[row.method]))], model, inputs)
                run = kind(model, inputs, setting.device)
                if reason := refusal(row.method, run):
                    refused[str(row)] = reason
                else:
                    made[str(row)], runs[str(row)] = model, run
            found: dict[str, Any] = dict(setting.timed(runs, name))
        if setting.device.name == "cuda" and kind is step:
            for method, run in runs.items():
                found[method]["peak_bytes"] = peak_bytes(made[method], run)
        return found | ({"refused": refused} if refused else {})

    return group


def language(setting: Setting) -> dict[str, Any]:
    """Generation, of one token and of more, each method in its turn."""
    ids = setting.inputs("smollm2")["input_ids"][:, :64]
    runs: dict[str, Run] = {}
    frozen: Frozen = {}
    refused: dict[str, str] = {}
    for row in COMPILED_LANGUAGE if setting.device.compiled else LANGUAGE:
        run = generation(setting.build(SHAPES["smollm2"], row, frozen), ids, setting.tokens, setting.device)
        if reason := refusal(row.method, run):
            refused[str(row)] = reason
        else:
            runs[str(row)] = run
    found: dict[str, Any] = dict(setting.timed(runs, "smollm2 generation"))
    return found | ({"refused": refused} if refused else {})


def several_backbones(setting: Setting) -> dict[str, Any]:
    """Forwards of pMoE by dispatcher, and of its backbones alone with as many idle tokens."""
    name = "vit-b16-hf"
    pixels = setting.inputs(name)["pixel_values"]
    with torch.device(setting.device.name):
        frozen = frozen_backbones(10, 2, setting.depth(SHAPES[name]), setting.small)
    frozen = [setting.device.ready(model.to(setting.device.dtype)) for model in frozen]

    def run() -> dict[str, float]:
        start = setting.device.now()
        with torch.no_grad(), setting.device.autocast():
            for model in frozen:
                model(pixels)
        return {"forward": setting.device.now() - start}

    runs = {"frozen": run}
    runs |= {
        str(row): forward(setting.build(SHAPES[name], row), {"pixel_values": pixels}, setting.device)
        for row in EXPERTS
    }
    return setting.timed(runs, "several backbones")


def lives(name: str) -> Group:
    """Attaching, saving and loading adapters of one model."""

    def group(setting: Setting) -> dict[str, Any]:
        shape = SHAPES[name]
        base = setting.build(shape, Row("base"))
        runs = {str(row): life(base, config(shape, row), setting.device) for row in ADAPTERS[name]}
        return setting.timed(runs, f"{name} adapters")

    return group


def imports(setting: Setting) -> dict[str, Any]:
    return setting.timed({"peft_promptmoe": importing}, "imports")


def compilations(name: str) -> Group:
    """Graphs that training and evaluation in turns need when compiled, of small models of the same code."""

    def group(setting: Setting) -> dict[str, Any]:
        shape = SHAPES[name]
        inputs = shape.inputs(2, small=True)
        rows = [row for row in ADAPTERS[name] if row.method.startswith(("static", "vpt", "vapt", "mept"))]
        return {
            str(row): graphs(build(shape, row._replace(prompts=3), 2, True), inputs, (True, False, True, False))
            for row in rows
        }

    return group


GROUPS: dict[str, Group] = {
    "bert-base step": models("bert-base", step, (*BASELINES, *TEXT)),
    "bert-base experts step": models("bert-base", step, (Row("lora_r8"), *MANY)),
    "bert-base forward": models("bert-base", forward, (*FROZEN, *TEXT, Row("static_cached", 50, 1))),
    "vit-b16-hf step": models("vit-b16-hf", step, (*BASELINES, *IMAGES, EXPERTS[0])),
    "vit-b16-hf forward": models("vit-b16-hf", forward, (*FROZEN, *IMAGES, Row("vpt_cached", 50))),
    "vit-b16-timm step": models("vit-b16-timm", step, (*BASELINES, *IMAGES)),
    "vit-b16-timm forward": models("vit-b16-timm", forward, (*FROZEN, *IMAGES, Row("vpt_cached", 50))),
    "several backbones forward": several_backbones,
    "smollm2 generation": language,
    "bert-base adapters": lives("bert-base"),
    "vit-b16-hf adapters": lives("vit-b16-hf"),
    "import": imports,
    "bert-base graphs": compilations("bert-base"),
    "vit-b16-hf graphs": compilations("vit-b16-hf"),
}


def parse_args(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 weights under bf16 autocast, adapters in float32")
    parser.add_argument("--compile", action="store_true", help="compile steps and forwards")
    parser.add_argument("--repeats", type=int, default=9, help="turns that count; one more warms up")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--scale", type=int, default=1, help="batches are this many times as large")
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are decoded after the first")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--results", type=Path, help="JSON file (default: benchmarks/results/times_DEVICE[...].json)")
    return parser.parse_args(given)


def main(args: argparse.Namespace) -> None:
    quiet()
    torch.set_num_threads(args.threads)
    device = Device(args.device, args.bf16, args.compile)
    batch = {name: args.scale * size for name, size in BATCH.items()}
    setting = Setting(device, args.repeats, batch, args.tokens, args.small)
    suffix = "".join(f"_{part}" for part in ("bf16", "compile") if getattr(args, part))
    path = args.results or FOLDER / f"times_{args.device}{suffix}.json"
    results = Results(path, asdict(setting) | {"threads": args.threads})
    # Models of one class share compiled code, and beyond the default limit of variants torch falls back to eager.
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        for name in args.groups:
            results.cell(name, partial(GROUPS[name], setting))
    show(results)


def show(results: Results) -> None:
    for name, group in results.cells.items():
        print(name)
        for method, kinds in group.items():
            print(f"  {method:22}" + "   ".join(f"{kind} {show_one(value)}" for kind, value in kinds.items()))


def show_one(value: Any) -> str:
    return f"{value['min_s']:.4f} s" if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    main(parse_args())
