# SPDX-License-Identifier: Apache-2.0
"""What a batch of samples with eight different adapters costs over a batch with one (`adapter_names`).

    python benchmarks/mixed_batch.py

Forwards in evaluation of BERT-base's width, 8 texts of 128 tokens, two layers: FLOPs, and seconds taken in turns.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.methods import build, config
from harness.reading import FOLDER
from harness.rows import Row
from harness.shapes import SHAPES, quiet
from harness.timing import interleaved
from harness.training import Results, Stopwatch
from peft_promptmoe import cached_prompts

SHAPE, LAYERS, ADAPTERS = "bert-base", 2, 8
ROWS = (Row("static", 20, 1), Row("mept_sample", 20, 4), Row("mept_token", 20, 4))


def run(model: nn.Module, inputs: dict[str, Any], names: list[str]) -> None:
    with torch.no_grad():
        model(**inputs, adapter_names=names)


def flops(model: nn.Module, inputs: dict[str, Any], names: list[str]) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model, inputs, names)
    return counter.get_total_flops()


def cached_flops(model: nn.Module, inputs: dict[str, Any], names: list[str]) -> int:
    """Of a forward that finds the rows of all adapters' prompts projected."""
    with cached_prompts(model):
        run(model, inputs, names)
        return flops(model, inputs, names)


def measure(row: Row, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = SHAPES[SHAPE]
    model: Any = build(shape, row, LAYERS, False, torch.float32)
    for number in range(1, ADAPTERS):
        model.add_adapter(f"adapter{number}", config(shape, row))
    model.eval()
    inputs = shape.inputs(ADAPTERS, False)
    batches = {"one": ["default"] * ADAPTERS, "eight": ["default", *(f"adapter{n}" for n in range(1, ADAPTERS))]}
    found: dict[str, Any] = {}
    for kind, names in batches.items():
        found[f"{kind}_flops"] = flops(model, inputs, names)
    if row.method != "mept_sample":  # whose prompts depend on the input
        one, eight = (cached_flops(model, inputs, names) for names in batches.values())
        found["cached_flops_ratio"] = round(eight / one, 4)

    def seconds(names: list[str]) -> dict[str, float]:
        with Stopwatch() as watch:
            run(model, inputs, names)
        return {"forward": watch.seconds}

    times = interleaved(
        {kind: lambda names=names: seconds(names) for kind, names in batches.items()}, repeats, 2, str(row)
    )
    found["flops_ratio"] = round(found["eight_flops"] / found["one_flops"], 4)
    found["time_ratio"] = round(times["eight"]["forward"]["min_s"] / times["one"]["forward"]["min_s"], 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=FOLDER / "mixed_batch.json")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    results = Results(args.results, {"shape": SHAPE, "layers": LAYERS, "adapters": ADAPTERS, "repeats": args.repeats})
    for row in ROWS:
        cell = results.cell(str(row), lambda row=row: measure(row, args.repeats))
        print(f"{row!s:24} FLOPs x {cell['flops_ratio']:.3f}   time x {cell['time_ratio']:.3f}")


if __name__ == "__main__":
    main()
