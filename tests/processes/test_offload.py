# SPDX-License-Identifier: Apache-2.0
"""accelerate's offloading of a prompted model: weights wait elsewhere and come when their module is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import offload_state_dict
from cases import Case, assert_equal, each_case, one_per_architecture, predict
from peft import get_peft_model
from torch import nn

CPU = torch.device("cpu")


def on_disk_in_part(model: nn.Module, folder: Path) -> None:
    """Prompts and blocks on disk, all else in memory."""
    place: dict[str, Any] = {name.rpartition(".")[0]: "cpu" for name in model.state_dict()}
    place |= {name: "disk" for name in place if ".promptmoe." in name or ".0." in name}
    offload_state_dict(folder, model.state_dict())
    dispatch_model(model, place, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "some-disk": on_disk_in_part,
}


def check(way: str, model: nn.Module, run: Callable[[], torch.Tensor], folder: Path) -> None:
    expected = run()
    WAYS[way](model, folder)
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert any("promptmoe" in name for name in away) and any("promptmoe" not in name for name in away)
    for _ in range(2):
        assert_equal(run(), expected, f"logits with weights on {way}")


def can_be_offloaded(case: Case) -> bool:
    return one_per_architecture(case) and not case.architecture.timm


def can_be_away_as_a_whole(case: Case) -> bool:
    """Llama 4 and DeBERTa hand on or ask for weights that are away; the base models alone fail the same way."""
    return can_be_offloaded(case) and case.architecture_name not in ("llama4", "deberta_v3")


@pytest.mark.parametrize("way", ["cpu", "disk"])
@each_case(can_be_away_as_a_whole)
def test_an_offloaded_model_gives_the_same_logits(case: Case, way: str, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    check(way, model, lambda: predict(model, batch), tmp_path)


@each_case(can_be_offloaded)
def test_a_model_that_is_offloaded_in_part_gives_the_same_logits(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    check("some-disk", model, lambda: predict(model, batch), tmp_path)


@pytest.mark.parametrize("way", ["cpu", "disk"])
@each_case(lambda case: case.architecture.timm and case.method_name != "pmoe" and one_per_architecture(case))
def test_an_offloaded_timm_model_gives_the_same_logits(case: Case, way: str, tmp_path: Path) -> None:
    """timm's own model; transformers' wrapper calls parts of it past the hooks, and fails with or without adapter."""
    torch.manual_seed(1)
    model = get_peft_model(case.base().timm_model, case.config()).eval()
    pixels = case.batch()["pixel_values"]
    with torch.no_grad():
        check(way, model, lambda: model(pixels), tmp_path)


@each_case(lambda case: case.architecture_name in ("bert", "vit") and one_per_architecture(case))
def test_adapters_are_not_added_to_weights_that_are_away(case: Case) -> None:
    base, batch = case.base(), case.batch()
    expected = predict(base, batch)
    cpu_offload(base, execution_device=CPU)
    with pytest.raises(ValueError, match="offload both together"):
        case.model(base)
    assert_equal(predict(base, batch), expected, "logits of the offloaded base model after a refusal")
    assert not any("promptmoe" in name for name, _ in base.named_modules())
