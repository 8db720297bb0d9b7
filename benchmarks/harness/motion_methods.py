# SPDX-License-Identifier: Apache-2.0
"""Methods that are compared on motion and depth, ProMotion without its parts, and its prototypes on another task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_promptmoe import ProMotionConfig, VAPTConfig

from .bottleneck import add_bottlenecks

SHARED = [3, 4, 5]  # blocks whose units take prototypes from one task to the other: those that flow reads
TRANSFERRED: dict[str, Any] = {"layers_to_transform": SHARED, "unit_scale": 1.0}
SHOWN = 224  # pixels a side of the pairs that are trained on


@dataclass(frozen=True)
class Method:
    """How to make a model of one with heads, given the blocks that these read, and the rates to try.

    Attributes:
        untouched: of the blocks that are read, how many blocks from the first one it leaves as they are.
        foreign: whether its prototypes come from the other task.
    """

    attach: Callable[[Any, list[int]], nn.Module]
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    frozen: bool = True
    untouched: Callable[[list[int]], int] = lambda blocks: 0
    foreign: bool = False


def up_to(blocks: list[int]) -> list[int]:
    """All blocks up to the last one that is read."""
    return list(range(blocks[-1] + 1))


def lora(model: Any, blocks: list[int]) -> nn.Module:
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(target_modules=names, layers_to_transform=blocks, modules_to_save=model.head_names)
    return get_peft_model(model, config)


def prompts(everywhere: bool = False, **settings: Any) -> Method:
    """VAPT, or VPT-Deep, in the blocks that are read, or in all up to the last of them."""

    def attach(model: Any, blocks: list[int]) -> nn.Module:
        place = {"layers_to_transform": up_to(blocks) if everywhere else blocks}
        shared = {"image_size": [SHOWN, SHOWN], "modules_to_save": model.head_names}
        return get_peft_model(model, VAPTConfig(**shared, **place, **settings))

    return Method(attach, (1e-3, 3e-3, 1e-2), untouched=lambda blocks: 0 if everywhere else blocks[0])


def promotion(first: int = 0, foreign: bool = False, **settings: Any) -> Method:
    """Units behind all blocks that count, or, where `layers_to_transform` is set, behind others from `first` on."""

    def attach(model: Any, blocks: list[int]) -> nn.Module:
        return get_peft_model(model, ProMotionConfig(modules_to_save=model.head_names, **settings))

    return Method(attach, untouched=lambda blocks: first + 1, foreign=foreign)


def promotion_where_read(model: Any, blocks: list[int]) -> nn.Module:
    config = ProMotionConfig(modules_to_save=model.head_names, layers_to_transform=blocks)
    return get_peft_model(model, config)


def with_frozen_prototypes(foreign: bool) -> Method:
    """Units of which only what carries their prototypes back into the block trains."""
    method = promotion(
        SHARED[0],
        foreign,
        **TRANSFERRED,
        bank_momentum=1.0,
        denoise_weight=0.0,
        margin_weight=0.0,
        compact_weight=0.0,
    )

    def attach(model: Any, blocks: list[int]) -> nn.Module:
        made = method.attach(model, blocks)
        for name, parameter in made.named_parameters():
            if is_prototypes(name):
                parameter.requires_grad_(False)
        return made

    return Method(attach, untouched=method.untouched, foreign=foreign)


def is_prototypes(name: str) -> bool:
    """Whether a tensor is part of what makes prototypes: all of a unit but the way back into the block."""
    return "promotion_" in name and "promotion_up" not in name


def take_prototypes(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put prototypes of units of another model in the place of these; the units stand behind the same blocks."""
    state = model.state_dict()
    own = {name for name in state if is_prototypes(name)}
    if own != set(tensors):
        raise ValueError(f"Units of the two models differ: {sorted(own ^ set(tensors))}.")
    model.load_state_dict(state | tensors)


METHODS = {
    "head": Method(lambda model, blocks: model, (1e-3, 3e-3, 1e-2), untouched=lambda blocks: blocks[-1] + 1),
    "bottleneck": Method(add_bottlenecks, untouched=lambda blocks: blocks[0] + 1),
    "bottleneck-all": Method(lambda model, blocks: add_bottlenecks(model, up_to(blocks)), untouched=lambda blocks: 1),
    "promotion": promotion(),
    "promotion-read": Method(promotion_where_read, untouched=lambda blocks: blocks[0] + 1),
    "lora": Method(lora, untouched=lambda blocks: blocks[0]),
    "lora-all": Method(lambda model, blocks: lora(model, up_to(blocks))),
    "vapt": prompts(),
    "vapt-all": prompts(everywhere=True),
    "vpt-deep": prompts(num_static_layers="all"),
    "vpt-deep-all": prompts(everywhere=True, num_static_layers="all"),
    "full": Method(lambda model, blocks: model, (1e-5, 3e-5, 1e-4), frozen=False),
}
# At ProMotion's own rate.
ABLATIONS = {
    f"promotion, {name}": promotion(**settings)
    for name, settings in {
        "no denoiser": {"denoise_steps": 0},
        "no denoiser loss": {"denoise_weight": 0.0},
        "denoiser without noise": {"noise_std": 1e-3},
        "no feedback": {"feedback": False},
        "no margin loss": {"margin_weight": 0.0},
        "softmax": {"balance": 0.0},
        "not centred": {"center": False},
        "pool": {"proposal": "pool"},
        "8 prototypes": {"num_prototypes": 8},
        "64 prototypes": {"num_prototypes": 64},
        "noise of 0.3": {"noise_std": 0.3},
        "width 64": {"bottleneck_dim": 64},
    }.items()
}
OWN = "units with prototypes of this task"
TRANSFER = {
    OWN: promotion(SHARED[0], **TRANSFERRED),
    "units with frozen prototypes of the other task": with_frozen_prototypes(foreign=True),
    "units with frozen prototypes untrained": with_frozen_prototypes(foreign=False),
}
