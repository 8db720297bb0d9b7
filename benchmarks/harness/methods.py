# SPDX-License-Identifier: Apache-2.0
"""The methods compared in cost and time, by name: what each makes of a model, and which prompts and experts it has.

"promotion" has its units behind all blocks, and its prototypes where others have prompts. In "static" and with one
expert MEPT has no router; on images that is VPT-Deep, and has a row under that name only.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from peft_promptmoe import MEPTConfig, PMoEConfig, ProMotionConfig, VAPTConfig

from .rows import DISPATCHERS, Row
from .shapes import LONG, SHAPES, SMALL, Shape

EVERY_BLOCK = r"(.*\.)?(layers|blocks)\.\d+\.(attention|attn)"
PROTOTYPES = 16
PROMPTS, EXPERTS = (10, 20, 50, 100), (4, 16, 64)
MANY_EXPERTS = (4, 16, 64, 256)


def config(shape: Shape, row: Row, further: list[nn.Module] | None = None) -> PeftConfig:
    """PEFT's config of a method that is an adapter; `further` are pMoE's backbones beside the base model."""
    task, prompts = shape.task, row.prompts
    match row.method:
        case "lora_r8":
            heads = [shape.head] if shape.head else None
            return LoraConfig(
                task_type=task, r=8, lora_alpha=16, target_modules=shape.attention, modules_to_save=heads
            )
        case "prompt_tuning":
            return PromptTuningConfig(task_type=task, num_virtual_tokens=prompts, prompt_tuning_init="SAMPLE_VOCAB")
        case "prefix_tuning":
            return PrefixTuningConfig(task_type=task, num_virtual_tokens=prompts)
        case "p_tuning":
            return PromptEncoderConfig(task_type=task, num_virtual_tokens=prompts)
        case "vpt_deep":
            return VAPTConfig(num_virtual_tokens=prompts, num_static_layers="all")
        case "vapt":
            return VAPTConfig(num_virtual_tokens=prompts)
        case "promotion":
            return ProMotionConfig(target_modules=EVERY_BLOCK, num_prototypes=row.prompts)
        case "static":
            return MEPTConfig(
                task_type=task, num_virtual_tokens=prompts, num_experts=1, num_shared_experts=0, routing="sample"
            )
        case "mept_sample":
            return MEPTConfig(task_type=task, num_virtual_tokens=prompts, num_experts=row.experts, routing="sample")
        case "mept_token":
            # A decoder can only see prompts that are the same for all tokens of a sample.
            decoder = {"decoder_sees_prompts": False} if task == "SEQ_2_SEQ_LM" else {}
            return MEPTConfig(
                task_type=task, num_virtual_tokens=prompts, num_experts=row.experts, routing="token", **decoder
            )
        case method if method.startswith("pmoe_"):
            return PMoEConfig(experts=further, num_virtual_tokens=prompts, dispatcher=method.removeprefix("pmoe_"))
    raise ValueError(f"no method is called {row.method!r}")


def build(
    shape: Shape,
    row: Row,
    depth: int | None = None,
    small: bool = False,
    dtype: torch.dtype | None = None,
    further: list[nn.Module] | None = None,
) -> nn.Module:
    """A new model of this shape, ready to be trained by a method; "base" trains nothing, "full" everything.

    `dtype` is that of the base model. `further` are pMoE's backbones beside it, if they are not to be random ones.
    """
    depth = depth or shape.depth
    model = shape.make(depth, small).to(dtype)
    if row.method == "full":
        return model
    if row.method in ("base", "head"):
        model.requires_grad_(False)
        if row.method == "head":
            next(module for name, module in model.named_modules() if is_head(name, shape)).requires_grad_(True)
        return model
    if not row.method.startswith("pmoe_"):
        return get_peft_model(model, config(shape, row))
    if further is None:
        assert row.experts is not None
        further = [backbone.to(dtype) for backbone in backbones(row.experts - 1, depth, small)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The normalisation")  # random weights know no pixels
        return get_peft_model(model, config(shape, row, further))


def share_frozen(model: nn.Module, frozen: dict[str, Tensor]) -> None:
    """Make a model hold those of its frozen weights that `frozen` has with the same values, and add the others to it.

    Where weights lie decides how fast they are read, by a tenth and more from one copy to the next.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            key = re.sub(r"^(base_model\.|model\.)*", "", name).replace(".base_layer", "")
            held = frozen.setdefault(key, parameter.data)
            if torch.equal(held, parameter.data):
                parameter.data = held


def is_head(name: str, shape: Shape) -> bool:
    """Whether a module or parameter of this name is the model's head, or belongs to it."""
    return shape.head in name.split(".")


def backbones(number: int, depth: int, small: bool = False) -> list[nn.Module]:
    """pMoE's further backbones: another ViT-B/16, and a ViT-S/16 of timm."""
    settings = {**SMALL, "image_size": 32} if small else {}
    name, args = ("vit_tiny_patch16_224", {"img_size": 32}) if small else ("vit_small_patch16_224", {})
    makers: list[Callable[[], nn.Module]] = [
        lambda: ViTModel(ViTConfig(num_hidden_layers=depth, **settings), add_pooling_layer=False),
        lambda: timm.create_model(name, num_classes=0, depth=depth, **args),
    ]
    return [make() for make in makers[:number]]


def frozen_backbones(prompts: int, number: int, depth: int, small: bool = False) -> list[nn.Module]:
    """pMoE's yardstick: its backbones alone, each with `prompts` tokens more in every block, which do nothing."""
    models = [SHAPES["vit-b16-hf"].make(depth, small), *backbones(number - 1, depth, small)]
    for model in models:
        blocks: Any = getattr(model, "blocks", None) or getattr(getattr(model, "vit", model), "layers", None)
        blocks[0].register_forward_pre_hook(partial(_idle_tokens, prompts))
        model.requires_grad_(False).eval()
    return models


def _idle_tokens(number: int, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Tensor = args[0]
    return torch.cat([x, x.new_zeros(x.shape[0], number, x.shape[2])], dim=1), *args[1:]


def grid(name: str) -> Iterator[Row]:
    """The rows of the exact costs for a shape: every method that the shape can have, in every size."""
    if name in LONG:
        yield from (Row("base"), Row("lora_r8"))
        if name == "bert-base-1024":
            yield from (Row("mept_token", 10, experts) for experts in MANY_EXPERTS)
            return
        yield from (Row("prefix_tuning", 20),) if not LONG[name].padded else ()  # it takes no mask that is ready
        yield from (Row("mept_sample", 20, 4), Row("mept_token", 20, 4), Row("mept_token", 20, 64))
        return
    shape = SHAPES[name]
    yield Row("base")
    if shape.head:
        yield Row("head")
    yield Row("full")
    yield Row("lora_r8")
    text = ("prompt_tuning", "prefix_tuning", "p_tuning", "static")
    if not shape.task:
        yield Row("promotion", PROTOTYPES)
    for method in text if shape.task else ("vpt_deep", "vapt"):
        yield from (Row(method, prompts, 1 if method == "static" else None) for prompts in PROMPTS)
    for method in ("mept_sample", "mept_token"):
        yield from (Row(method, prompts, EXPERTS[0]) for prompts in PROMPTS)
        yield from (Row(method, 20, experts) for experts in EXPERTS[1:])
    if name == "bert-base":
        yield from (Row("mept_token", 10, experts) for experts in MANY_EXPERTS[1:])
    if name == "vit-b16-hf":
        yield from (Row(f"pmoe_{dispatcher}", 10, 2) for dispatcher in DISPATCHERS)
        yield from (Row("pmoe_token", prompts, 2) for prompts in PROMPTS[1:])
        yield from (Row("pmoe_token", 10, backbones) for backbones in (1, 3))
