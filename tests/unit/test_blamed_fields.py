# SPDX-License-Identifier: Apache-2.0
"""Layers that one field asks for and another one leaves out: the message names the field that is to blame."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_promptmoe import MEPTConfig, PMoEConfig, ProMotionConfig, VAPTConfig


def vit(blocks: int = 4) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_hidden_layers=blocks, **sizes))


CONFIGS = {
    "mept": MEPTConfig,
    "vapt": VAPTConfig,
    "pmoe": lambda **settings: PMoEConfig(experts=[vit()], **settings),
    "promotion": ProMotionConfig,
}
LAST = r".*\.3\..*"
CASES = {
    "excluded": (
        {"layers_to_transform": [2, 3], "exclude_modules": LAST},
        "^layers_to_transform names layer 3, but exclude_modules=.* leaves this out. Remove it from one",
    ),
    "only-excluded": (
        {"layers_to_transform": 3, "exclude_modules": ["layers.3.attention"]},
        "^layers_to_transform names layer 3, but exclude_modules=.* leaves this out",
    ),
    "named-and-excluded": (
        {"layers_to_transform": [3], "target_modules": ["attention"], "exclude_modules": LAST},
        "^layers_to_transform names layer 3, but exclude_modules=.* leaves this out",
    ),
    "excluded-and-strange": (
        {"layers_to_transform": [2, 3, 9], "exclude_modules": LAST},
        "^layers_to_transform names layer 9, not among the layers of .* that prompts can join: 0 to 2 ",
    ),
    "copied": (
        {"layers_to_transform": [2, 3], "modules_to_save": ["layers.3"]},
        "^layers_to_transform names layer 3, but modules_to_save=.* makes a copy",
    ),
    "only-copied": (
        {"layers_to_transform": [3], "modules_to_save": ["layers.3"]},
        "^layers_to_transform names layer 3, but modules_to_save=.* makes a copy",
    ),
    "not-targeted": (
        {"layers_to_transform": [2, 3], "target_modules": ["layers.1.attention", "layers.2.attention"]},
        "^layers_to_transform names layer 3, not among .* that target_modules=.* names: 1, 2 ",
    ),
    "all-excluded": ({"exclude_modules": ["attention"]}, "^exclude_modules=.* leaves out all attention layers"),
    "all-copied": ({"modules_to_save": ["layers"]}, "^modules_to_save=.* copies all attention layers"),
    "all-excluded-and-copied": (
        {"exclude_modules": ["attention"], "modules_to_save": ["layers"]},
        "^exclude_modules=.* leaves out all attention layers",
    ),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_the_field_to_blame(method: str, case: str) -> None:
    settings, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        get_peft_model(vit(), CONFIGS[method](**settings))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"exclude_modules": LAST}, "exclude_modules"),
        ({"modules_to_save": ["layers.3"]}, "modules_to_save"),
        ({"target_modules": ["layers.3.attention"]}, "target_modules"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pmoe_names_the_field_that_leaves_blocks_out(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"aligns its experts' blocks by depth, but {field}=.* leaves out some"):
        get_peft_model(vit(), PMoEConfig(experts=[vit()], **settings))


def test_blocks_that_another_model_has_set() -> None:
    config = ProMotionConfig()
    get_peft_model(vit(12), config)
    assert config.layers_to_transform == [*range(12)]
    with pytest.raises(ValueError, match=r"names layers 4, 5, .*used for another model before.*Make a new config"):
        get_peft_model(vit(4), config)
