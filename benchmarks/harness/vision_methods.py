# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared in learning on images, and the learning rates that each of them is tried at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn

from peft_promptmoe import MEPTConfig, VAPTConfig

from .methods import config
from .rows import Row
from .shapes import SHAPES

PROMPTS = 10


def everything(model: nn.Module, size: int) -> nn.Module:
    return model


def adapted(make: Callable[[int], PeftConfig]) -> Callable[[nn.Module, int], nn.Module]:
    return lambda model, size: get_peft_model(model, make(size))


def lora(size: int) -> PeftConfig:
    return config(SHAPES["vit-b16-hf"], Row("lora_r8"))  # DINOv2's modules have ViT's names


def vapt(**options: Any) -> Callable[[int], PeftConfig]:
    return lambda size: VAPTConfig(num_virtual_tokens=PROMPTS, image_size=size, **options)


def mept(size: int) -> PeftConfig:
    return MEPTConfig(num_virtual_tokens=PROMPTS, routing="sample")


@dataclass(frozen=True)
class Method:
    """A way to train: what it makes of a base model for images of a size, None to train a head on features that are
    computed once.
    """

    build: Callable[[nn.Module, int], nn.Module] | None
    lrs: tuple[float, ...]


# Six rates each, a factor of about three apart, around what trial runs suggest.
MATRICES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PROMPT_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
METHODS = {
    "head": Method(None, PROMPT_RATES),
    "full": Method(everything, (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)),
    "lora": Method(adapted(lora), MATRICES),
    "vpt-deep": Method(adapted(vapt(num_static_layers="all")), PROMPT_RATES),
    "vapt": Method(adapted(vapt()), MATRICES),
    "mept-sample": Method(adapted(mept), MATRICES),
}
