# SPDX-License-Identifier: Apache-2.0
"""The committed exact figures are those of this code, and the ways in which they are counted are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cost_exact import RESULTS, counts, moved, record
from harness.counting import active_parameters, at_depth, fake, safetensors_bytes, saved_bytes, stored
from harness.methods import build
from harness.rows import Row
from harness.shapes import SHAPES

COMMITTED = json.loads(RESULTS.read_text())["records"]
SUBSET = [
    ("bert-base", Row("lora_r8")),
    ("bert-base", Row("mept_sample", 20, 4)),
    ("llama-1b", Row("mept_token", 20, 16)),
    ("vit-b16-hf", Row("vapt", 50)),
    ("vit-b16-timm", Row("vpt_deep", 100)),
    ("vit-b16-hf", Row("promotion", 16)),
    ("bert-base", Row("p_tuning", 20)),
    ("t5-base", Row("mept_sample", 10, 4)),
    ("llama-1b", Row("prompt_tuning", 50)),
    ("vit-b16-hf", Row("pmoe_token", 10, 2)),
    ("vit-b16-timm", Row("full")),
]
SLOW = SUBSET[5:]


def cells(chosen: list[tuple[str, Row]]) -> pytest.MarkDecorator:
    """A test of each of these models and methods; some in the full run only."""
    marked = {True: pytest.mark.slow, False: ()}
    params = [pytest.param(*cell, id=f"{cell[0]}-{cell[1]}", marks=marked[cell in SLOW]) for cell in chosen]
    return pytest.mark.parametrize(("name", "row"), params)


def committed(name: str, row: Row) -> list[dict[str, Any]]:
    return [
        each
        for each in COMMITTED
        if each["model"] == name and all(each[key] == size for key, size in row._asdict().items())
    ]


@cells(SUBSET)
def test_figures_are_the_committed_ones(name: str, row: Row) -> None:
    """If a figure moved for a good reason, run benchmarks/cost_exact.py and commit what it writes."""
    assert moved(committed(name, row), [record(name, row)]) == []


@pytest.mark.parametrize("name", ["vit-b16-hf", "vit-b16-timm"])
def test_units_behind_all_twelve_blocks_cost_what_was_promised(name: str) -> None:
    base, lora, units = (committed(name, row)[0] for row in (Row("base"), Row("lora_r8"), Row("promotion", 16)))
    assert 1.0 < units["forward_flops"] / base["forward_flops"] <= 1.012
    assert units["train_flops"] / lora["train_flops"] <= 1.05
    assert units["saved_bytes"] / lora["saved_bytes"] <= 1.10
    assert units["graph_breaks"] == 0


def test_a_figure_that_moved_is_told() -> None:
    (before,) = committed("bert-base", Row("lora_r8"))
    for factor, told in ((1.009, 0), (0.991, 0), (1.011, 1), (0.989, 1)):
        assert len(moved([before], [before | {"saved_bytes": int(factor * before["saved_bytes"])}])) == told
    assert moved([before], []) == ["bert-base lora_r8: only before"]
    assert moved([], [before]) == ["bert-base lora_r8: only now"]
    assert len(moved([before | {"graph_breaks": 0}], [before | {"graph_breaks": 1}])) == 1
    assert len(moved([before], [{key: value for key, value in before.items() if key != "train_flops"}])) == 1


@cells(SUBSET[2:])
def test_every_further_block_adds_the_same(name: str, row: Row) -> None:
    deep = SHAPES[name].ends + 3
    assert at_depth(deep, SHAPES[name].ends, lambda blocks: counts(name, row, blocks)) == counts(name, row, deep)


REAL = [
    (name, row)
    for name, shape in SHAPES.items()
    for row in (Row("lora_r8"), Row("prompt_tuning", 3), Row("mept_sample", 3, 4), Row("mept_token", 3, 4))
    if shape.task or row.method != "prompt_tuning"
]


@cells(REAL)
def test_bytes_are_those_of_a_real_run(name: str, row: Row) -> None:
    shape = SHAPES[name]
    model = build(shape, row, depth=2, small=True)
    found = saved_bytes(model, shape.inputs(2, small=True))
    with fake(model):
        assert saved_bytes(model, shape.inputs(2, small=True)) == found > 0


@pytest.mark.parametrize("row", [Row("lora_r8"), Row("p_tuning", 3), Row("mept_token", 3, 4)], ids=str)
def test_size_of_the_file_is_known_without_writing_it(row: Row, tmp_path: Path) -> None:
    model = build(SHAPES["bert-base"], row, depth=2, small=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as content:
        assert set(content.keys()) == set(stored(model))
    assert file.stat().st_size == safetensors_bytes(stored(model))


def test_of_routed_experts_only_the_chosen_count_as_active() -> None:
    prompts, experts, width, layers, head = 3, 4, 32, 2, 2 * (32 + 1)
    model = build(SHAPES["bert-base"], Row("mept_sample", prompts, experts), depth=layers, small=True)
    chosen_and_shared, router = 2 * prompts * width, experts * width
    assert active_parameters(model) == layers * (chosen_and_shared + router) + head
