# SPDX-License-Identifier: Apache-2.0
"""What PEFT's own methods reach of the same models: LoRA on all linear layers, and prefix tuning."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from .checks import run
from .inputs import Inputs

PREFIX_KINDS = ("causal", "vision-language", "with images")


def reached_by_others(base: Any, kind: str, task: str | None, inputs: Inputs) -> dict[str, bool]:
    """By method, whether a prompted copy runs and gives finite outputs; of kinds that the method is for."""
    found: dict[str, bool] = {}
    if kind != "timm":  # of which PEFT does not know what all linear layers are
        found["lora"] = _runs(base, LoraConfig(r=4, target_modules="all-linear", task_type=task), inputs)
    if kind in PREFIX_KINDS:
        found["prefix"] = _runs(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), inputs)
    return found


def _runs(base: Any, config: Any, inputs: Inputs) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = run(get_peft_model(copy.deepcopy(base), config).eval(), inputs)
    except Exception:  # whatever a method does not like of a model
        return False
    return bool(torch.isfinite(output).all())
