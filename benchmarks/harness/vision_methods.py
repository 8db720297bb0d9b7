# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared in learning on images, and the learning rates that each of them is tried at."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_promptmoe import MEPTConfig, VAPTConfig

from .methods import config
from .rows import Row
from .shapes import SHAPES
from .training import ADAMW, Budget, Recipe, parameter_groups

PROMPTS = 10


def everything(model: nn.Module, size: int) -> nn.Module:
    return model


def adapted(make: Callable[[int], PeftConfig]) -> Callable[[nn.Module, int], nn.Module]:
    return lambda model, size: get_peft_model(model, make(size))


def lora(size: int) -> PeftConfig:
    return config(SHAPES["vit-b16-hf"], Row("lora_r8"))  # DINOv2's modules have ViT's names


def vapt(prompts: int = PROMPTS, **options: Any) -> Callable[[int], PeftConfig]:
    return lambda size: VAPTConfig(num_virtual_tokens=prompts, image_size=size, **options)


def mept(size: int) -> PeftConfig:
    return MEPTConfig(num_virtual_tokens=PROMPTS, routing="sample")


@dataclass(frozen=True)
class Method:
    """A way to train: what it makes of a base model for images of a size, None to train a head on features that are
    computed once.
    """

    build: Callable[[nn.Module, int], nn.Module] | None
    lrs: tuple[float, ...]
    recipe: Recipe = ADAMW


class OfficialVAPT:
    """The recipe of VAPT's official code: SGD, a tenth of the steps to warm up, a cosine, one rate for all.

    Its rates are for batches of 256 and are scaled to the batch. Its head starts with biases that call every class
    unlikely. Weight decay is 1e-4, one of the four that the official search tries.
    """

    clip = math.inf
    warmup = 0.1

    def optimizer(self, model: nn.Module, lr: float, budget: Budget) -> torch.optim.Optimizer:
        *method, head = parameter_groups(model, lr, lr)
        weights = [tensor for tensor in head["params"] if tensor.ndim > 1]
        biases = [tensor for tensor in head["params"] if tensor.ndim == 1]
        for tensor in weights:
            nn.init.kaiming_normal_(tensor, mode="fan_out")
        for tensor in biases:
            nn.init.constant_(tensor, -math.log(99))
        rest = [tensor for group in method for tensor in group["params"]] + weights
        groups = [{"params": rest, "weight_decay": 1e-4}, {"params": biases, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=lr * budget.batch_size / 256, momentum=0.9)

    def factor(self, step: int, steps: int, budget: Budget) -> float:
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


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
# VAPT with other numbers of prompts, with static prompts in other blocks, and as its official code trains it.
OF_VAPT = {
    **{f"vapt-{prompts}": Method(adapted(vapt(prompts)), MATRICES) for prompts in (5, 20, 50)},
    **{f"vapt-static-{blocks}": Method(adapted(vapt(num_static_layers=blocks)), MATRICES) for blocks in (0, 2)},
    **{f"vpt-deep-{n}": Method(adapted(vapt(n, num_static_layers="all")), PROMPT_RATES) for n in (5, 20, 50)},
    "vapt-official": Method(adapted(vapt(projector_scale=1.0)), (0.5, 1.0, 2.5, 5.0, 10.0, 25.0), OfficialVAPT()),
}
ALL = METHODS | OF_VAPT
