# SPDX-License-Identifier: Apache-2.0
"""Accuracy against trained parameters: the methods are those that are run, in the sizes that they are said to have."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification, Dinov2Config, Dinov2ForImageClassification

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "advanced"))

import learning_text
from harness import size_curves, vision_methods
from harness.size_curves import CURVES
from harness.training import ADAMW
from harness.vision_tables import OF_VAPT


def test_curves_are_what_is_run() -> None:
    drawn = {method for methods in CURVES.values() for method in methods}
    run = {*learning_text.in_sizes(learning_text.Budget.epochs), *learning_text.IN_SIZES} - {"mept-centered"}
    assert drawn == run == {*learning_text.in_sizes(10)} - {"mept-centered"}


def test_a_curve_grows_and_says_how_many_prompts_a_token_meets() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    trained = {}
    for name in {method for methods in CURVES.values() for method in methods}:
        base = BertForSequenceClassification(BertConfig(vocab_size=30, intermediate_size=16, **sizes))
        model = learning_text.METHODS[name].build(base)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not isinstance(model, PeftModel) or model.active_peft_config.peft_type != "MEPT":
            continue
        config: Any = model.active_peft_config
        shared = config.num_shared_experts if config.routing == "token" else 0
        met = next(methods[name] for methods in CURVES.values() if name in methods)
        assert met == config.num_virtual_tokens * (1 + shared)
    for methods in CURVES.values():
        for small, large in pairwise(methods):
            assert trained[small] < trained[large]
    assert trained["lora-r1-qv"] < trained["static"] < trained["lora"] < trained["static-100"]


def test_sizes_come_from_both_files_in_the_order_of_what_they_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(trained: int, *scores: float) -> dict[str, Any]:
        sd = 0.01 if len(scores) > 1 else None
        return {"trainable": trained, "mean": sum(scores) / len(scores), "sd": sd, "test": list(scores), "lr": 0.001}

    files = {
        "task": {"summary": {"lora": row(800, 0.8, 0.9, 0.85), "other": row(1, 0.1)}, "step_seconds": {"lora": 0.25}},
        "task_sizes_3_epochs": {"summary": {"lora-r1": row(100, 0.7), "static-5": row(50, 0.6)}},
    }
    monkeypatch.setattr(size_curves, "results", lambda name: files.get(name, {}))
    assert [size.method for size in size_curves.sizes("task")] == ["lora-r1", "lora", "static-5"]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in size_curves.size_table("task").splitlines()]
    assert shown[2:] == [
        ["deep prompts", "50", "5", "0.600", "", "1", "0.001", ""],
        ["LoRA on all of attention", "100", "", "0.700", "", "1", "0.001", ""],
        ["LoRA on all of attention", "800", "", "0.850", "± 0.010", "3", "0.001", "0.25 s"],
    ]


def test_the_table_of_vapt_says_what_was_run() -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28}
    assert {*OF_VAPT} == {*vision_methods.OF_VAPT, "vapt", "vpt-deep"}
    for name, (method, prompts, static) in OF_VAPT.items():
        base = Dinov2ForImageClassification(Dinov2Config(patch_size=14, num_labels=2, **shape))
        made: Any = vision_methods.ALL[name].build(base, 28).active_peft_config
        assert (made.num_virtual_tokens, str(made.num_static_layers)) == (prompts, static)
        assert method.startswith("VAPT" if name.startswith("vapt") else "VPT-Deep")
        official = made.projector_scale == 1.0
        assert official == method.endswith("official recipe") == (vision_methods.ALL[name].recipe is not ADAMW)
