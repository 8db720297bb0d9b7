# SPDX-License-Identifier: Apache-2.0
"""Exact costs: what every method costs in figures that are the same on every machine.

    python benchmarks/cost_exact.py                       # writes benchmarks/results/cost_exact.json
    python benchmarks/cost_exact.py --check               # fails where a figure moved by more than 1 %
    python benchmarks/cost_exact.py --models bert-base    # prints the rows of some models only

FLOPs of a forward in evaluation and of a training step, bytes that a training forward keeps for its backward pass,
trained and active parameters, bytes on disk, graph breaks. Of `harness/`, `shapes.py` has the models, `methods.py` the
methods, and `counting.py` says how it is counted. A method that its library refuses for a model has the reason in its
record.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from tqdm import tqdm
from transformers.initialization import no_init_weights

from harness.counting import (
    active_parameters,
    at_depth,
    counted,
    fake,
    forward_flops,
    graphs,
    safetensors_bytes,
    saved_bytes,
    stored,
    train_flops,
)
from harness.methods import backbones, build, frozen_backbones, grid, is_head
from harness.reading import FOLDER, row_of
from harness.records import provenance, write
from harness.refusals import MAY_BE_REFUSED
from harness.rows import Row
from harness.shapes import LONG, SHAPES, quiet

RESULTS = FOLDER / "cost_exact.json"
MODELS = ("bert-base", "t5-base", "llama-1b", "vit-b16-hf", "vit-b16-timm", *LONG)
ALL = SHAPES | LONG
BATCH = 8
TOLERANCE = 0.01
Record = dict[str, Any]


def record(name: str, row: Row) -> Record:
    """All figures of one method on one model."""
    found: Record = {"model": name, **row._asdict()}
    try:
        model = blank(name, row)
        found["config"] = changed(model)
        with fake(model):
            found |= parameters(name, model)
        return found | counts(name, row) | compiled(name, row)
    except ValueError as error:
        if row.method not in MAY_BE_REFUSED:
            raise
        return found | {"refused": str(error)}


def blank(name: str, row: Row, depth: int | None = None) -> Any:
    """The model without values; for pMoE in memory, for it tells its backbones apart by their weights."""
    shape = ALL[name]
    if row.experts is None or not row.method.startswith("pmoe_"):
        with torch.device("meta"):
            return build(shape, row, depth)
    with no_init_weights():
        further = backbones(row.experts - 1, depth or shape.depth)
        for number, backbone in enumerate(further):
            for parameter in backbone.parameters():
                parameter.data.fill_(number + 1.0)  # names in the file depend on the weights
        return build(shape, row, depth, further=further)


def changed(model: torch.nn.Module) -> Record:
    """The adapter's settings that are not those of a new config of its type."""
    if not isinstance(model, PeftModel):
        return {}
    config: PeftConfig = model.peft_config["default"]
    usual, found = type(config)().to_dict(), config.to_dict()
    # What PEFT fills in from the model, and the model's own names.
    left_out = {"auto_mapping", "base_model_name_or_path", "base_record", "expert_records", "experts"}
    left_out |= {"modules_to_save", "task_type"}
    settings = {name: value for name, value in found.items() if name not in left_out and value != usual.get(name)}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    return {"peft_type": str(config.peft_type.value), **plain}


def parameters(name: str, model: torch.nn.Module) -> Record:
    shape = ALL[name]
    trained = [(each, parameter) for each, parameter in model.named_parameters() if parameter.requires_grad]
    file = stored(model)
    return {
        "trainable": sum(parameter.numel() for _, parameter in trained),
        "active": active_parameters(model),
        "head": sum(parameter.numel() for each, parameter in trained if is_head(each, shape)),
        "tensor_bytes": sum(tensor.numel() * tensor.element_size() for tensor in file.values()),
        "file_bytes": safetensors_bytes(file) if file else 0,
    }


def counts(name: str, row: Row, depth: int | None = None) -> dict[str, int]:
    """FLOPs and saved bytes at full depth by arithmetic, or counted at the depth given."""
    if depth is None:
        return at_depth(ALL[name].depth, ALL[name].ends, lambda blocks: counts(name, row, blocks))
    several = row.method.startswith("pmoe_")
    model = blank(name, row, depth)
    beside = model.peft_config["default"].experts if several else []
    model.to("meta")
    with torch.device("meta"):
        inputs = ALL[name].inputs(BATCH)
    found = {"forward_flops": forward_flops(model, inputs), "train_flops": train_flops(model, inputs)}
    # What a training forward has left without values is nothing to go on from.
    model = model if several else blank(name, row, depth)
    with fake(model, *beside):
        found["saved_bytes"] = saved_bytes(model, ALL[name].inputs(BATCH), beside)
    return found | ({"frozen_flops": frozen_flops(row.prompts, row.experts, depth)} if several else {})


@lru_cache
def frozen_flops(prompts: int, number: int, depth: int) -> int:
    """FLOPs of one forward of each of pMoE's backbones alone, with as many idle tokens."""
    with torch.device("meta"), torch.no_grad():
        models = frozen_backbones(prompts, number, depth)
        pixels = torch.empty(BATCH, 3, 224, 224)
        return counted(lambda: [model(pixels) for model in models])


@lru_cache
def small_graph_breaks(name: str, method: str, experts: int | None) -> int:
    shape = SHAPES[name]
    # The small model's images have four patches, enough for one prototype.
    model = build(shape, Row(method, 1 if method == "promotion" else 3, experts), depth=1, small=True)
    return graphs(model, shape.inputs(2, small=True))["graph_breaks"]


def compiled(name: str, row: Row) -> dict[str, int]:
    """Counted on a small model of the same code, once for all sizes, and once where nothing is added to the model."""
    name = next(short for short in SHAPES if name.startswith(short))
    method = "base" if row.method in ("head", "full") else row.method
    few = 2 if method.startswith("pmoe_") else 4
    return {"graph_breaks": small_graph_breaks(name, method, row.experts and min(row.experts, few))}


def moved(committed: list[Record], found: list[Record]) -> list[str]:
    """What differs: figures by more than the tolerance, anything else at all; records that only one side has."""

    def key(each: Record) -> str:
        return f"{each['model']} {row_of(each)}"

    before, after = ({key(each): each for each in records} for records in (committed, found))
    lines = [f"{name}: only {'before' if name in before else 'now'}" for name in sorted(before.keys() ^ after.keys())]
    for name in before.keys() & after.keys():
        for figure in before[name].keys() | after[name].keys():
            old, new = before[name].get(figure), after[name].get(figure)
            numbers = isinstance(old, int) and isinstance(new, int)
            if abs(new - old) > TOLERANCE * old if numbers else old != new:
                lines.append(f"{name}: {figure} was {old}, is {new}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, help="print the rows of these models, and write nothing"
    )
    parser.add_argument("--check", action="store_true", help="compare with the file, and write nothing")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    names = args.models or MODELS
    rows = [(name, row) for name in names for row in grid(name)]
    records = [record(name, row) for name, row in tqdm(rows, desc="exact figures")]
    if args.check:
        committed = [each for each in json.loads(RESULTS.read_text())["records"] if each["model"] in names]
        if differences := moved(committed, records):
            raise SystemExit("\n".join([f"{RESULTS.name} is out of date:", *differences]))
    elif args.models:
        for each in records:
            print(json.dumps(each))
    else:
        batch = {name: {"batch": BATCH, "length": ALL[name].length, "depth": ALL[name].depth} for name in MODELS}
        write(RESULTS, {**provenance(), "models": batch}, records)


if __name__ == "__main__":
    main()
