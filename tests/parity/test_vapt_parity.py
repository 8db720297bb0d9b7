# SPDX-License-Identifier: Apache-2.0
"""VAPT in the package against the loop-written oracle: outputs and every gradient, in float64."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from oracle import _NN as NN_WITH_FLOAT64_SOFTMAX
from peft import get_peft_model
from torch import Tensor, nn
from vapt_oracle import Block, Vapt, prompted_blocks

from peft_promptmoe import VAPTConfig

TOLERANCE = 1e-10
PROMPTS_MATTER = 1e-2
WIDTH, DEPTH, HEADS, PATCH, BATCH = 32, 3, 4, 8, 2
PROMPT_CHILD = "promptmoe"


@dataclasses.dataclass(frozen=True)
class Tower:
    """A tiny model of one architecture and what the oracle has to know of it.

    Attributes:
        build: makes it.
        blocks: path of its blocks.
        prefix: tokens in front of the patches.
        pixels: rows and columns of the images.
        size: what the config has to say of the images' size, where the model does not know.
        masked: name of the blocks' attention layer, where it takes relative positions as a mask.
        eager: transformers module whose eager attention goes through float32.
    """

    build: Callable[[], nn.Module]
    blocks: str
    prefix: int
    pixels: tuple[int, int] = (24, 24)
    size: tuple[int, int] | None = None
    masked: str | None = None
    eager: str | None = None

    @property
    def grid(self) -> tuple[int, int]:
        return self.pixels[0] // PATCH, self.pixels[1] // PATCH


def hugging_face(architecture: str, config: str, kernel: str = "sdpa", **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = getattr(transformers, config)(**settings, num_labels=3, attn_implementation=kernel)
        return getattr(transformers, architecture)(made)

    return build


def from_timm(architecture: str = "vit_tiny_patch16_224", **settings: Any) -> Callable[[], nn.Module]:
    made = {"img_size": 24, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return lambda: timm.create_model(architecture, num_classes=3, **made | settings)


SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": PATCH,
}
_vit = functools.partial(hugging_face, "ViTForImageClassification", "ViTConfig")
TALL, WIDE = (48, 32), (32, 48)

TOWERS: dict[str, Tower] = {
    "vit": Tower(_vit(**SIZES), "vit.layers", 1),
    "vit_eager": Tower(_vit("eager", **SIZES), "vit.layers", 1, eager="vit"),
    "vit_wide": Tower(_vit(**SIZES | {"image_size": WIDE}), "vit.layers", 1, WIDE),
    "dinov2": Tower(
        hugging_face(
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersConfig",
            **SIZES | {"image_size": 40},
            num_register_tokens=2,
        ),
        "dinov2_with_registers.encoder.layer",
        3,
        TALL,
        TALL,
    ),
    "timm": Tower(from_timm(), "blocks", 1),
    "timm_average": Tower(from_timm(class_token=False, global_pool="avg"), "blocks", 0),
    "timm_wide": Tower(from_timm(img_size=WIDE), "blocks", 1, WIDE),
}

# Whose blocks differ in what prompts meet there: other prefixes, rotary patches, relative positions, key norms.
MORE_TOWERS: dict[str, Tower] = {
    "deit": Tower(
        hugging_face("DeiTForImageClassificationWithTeacher", "DeiTConfig", "eager", **SIZES),
        "deit.layers",
        2,
        eager="deit",
    ),
    "beit": Tower(
        hugging_face(
            "BeitForImageClassification",
            "BeitConfig",
            **SIZES,
            use_relative_position_bias=True,
            layer_scale_init_value=1.0,
        ),
        "beit.layers",
        1,
        masked="attention",
    ),
    "dinov3": Tower(
        hugging_face("DINOv3ViTModel", "DINOv3ViTConfig", **SIZES | {"image_size": 40}, num_register_tokens=2),
        "model.layer",
        3,
        TALL,
        TALL,
    ),
    "clip": Tower(
        hugging_face("CLIPForImageClassification", "CLIPConfig", vision_config=SIZES),
        "vision_model.encoder.layers",
        1,
    ),
    "siglip": Tower(
        hugging_face("SiglipForImageClassification", "SiglipConfig", vision_config=SIZES),
        "vision_model.encoder.layers",
        0,
    ),
    "timm_registers": Tower(from_timm(reg_tokens=2, qk_norm=True, init_values=1.0, img_size=WIDE), "blocks", 3, WIDE),
    "timm_dinov3": Tower(from_timm("vit_small_patch16_dinov3", img_size=WIDE), "blocks", 5, WIDE),
}

DEFAULT = Vapt()
SCALE = DEFAULT.projector_scale
DEEP = Vapt(num_static_layers="all")

# One departure from the defaults each, or two that meet in the arithmetic.
SETTINGS: dict[str, Vapt] = {
    "kernel3-padding1": Vapt(kernel_size=3, padding=1),
    "kernel2-padding3": Vapt(padding=3),
    "no_conv": Vapt(use_conv=False),
    "channelwise": Vapt(channelwise_kernel=True),
    "channelwise-padding1": Vapt(channelwise_kernel=True, padding=1),
    "unshared": Vapt(share_projector=False),
    "no_projector": Vapt(use_projector=False),
    "scale": Vapt(learnable_scale=True),
    "unshared-scale": Vapt(share_projector=False, learnable_scale=True),
    "projector_scale": Vapt(projector_scale=4.0),
    "gelu": Vapt(activation="gelu"),
    "sigmoid": Vapt(activation="sigmoid"),
    "softmax": Vapt(activation="softmax"),
    "identity": Vapt(activation="identity"),
    "static0": Vapt(num_static_layers=0),
    "static2": Vapt(num_static_layers=2),
}

EVERYWHERE: dict[str, Vapt] = {
    "default": DEFAULT,
    "deep": DEEP,
    "channelwise-padding1-static0": Vapt(channelwise_kernel=True, padding=1, num_static_layers=0),
}


def noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def make_model(tower: Tower) -> nn.Module:
    """A random model with weights large enough for attention to be far from uniform."""
    model, generator = tower.build().double().eval(), torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        drawn = noise(weight.shape, generator)
        if weight.ndim == 1:  # biases, and gains of norms and layer scales around what they start from
            weight.add_(0.2 * drawn)
        elif "pos" in name or "token" in name or "class_embedding" in name:
            weight.copy_(0.7 * drawn)
        else:
            weight.copy_(1.3 * drawn / weight[0].numel() ** 0.5)
    return model


@torch.no_grad()
def fill(trained: dict[str, nn.Parameter]) -> None:
    """Random values under which every trained tensor matters."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in sorted(trained.items()):
        drawn = noise(weight.shape, generator)
        if ("vapt_norms" in name and name.endswith("weight")) or "vapt_scale" in name:
            weight.copy_(1.0 + 0.4 * drawn)
        elif "vapt_" in name:
            sizes = {"vapt_prompts": 0.7, "vapt_down": 1.5 / WIDTH**0.5 / SCALE, "vapt_up": 0.6 / SCALE}
            weight.copy_(next((size for part, size in sizes.items() if part in name), 0.4) * drawn)
        else:
            weight.add_(0.3 * drawn)


def make_peft_model(base: nn.Module, tower: Tower, vapt: Vapt) -> Any:
    dropouts = {"prompt_dropout": 0.0, "channel_dropout": 0.0, "projector_dropout": 0.0}
    size = None if tower.size is None else list(tower.size)
    model = get_peft_model(base, VAPTConfig(**dataclasses.asdict(vapt), **dropouts, image_size=size)).double()
    fill(trained_tensors(model))
    return model


def trained_tensors(model: Any) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.get_base_model().named_parameters() if weight.requires_grad}


def block_tensors(trained: dict[str, Tensor], blocks: str) -> list[Block]:
    """The oracle's view on the package's tensors, found by their names."""
    names = {
        "vapt_prompts.default.weight": "prompts",
        "vapt_norms.default.weight": "gain",
        "vapt_norms.default.bias": "shift",
        "vapt_kernel.default.weight": "kernel",
        "vapt_token_prompts.default.weight": "token_weight",
        "vapt_token_prompts.default.bias": "token_bias",
        "vapt_down.default.weight": "down",
        "vapt_up.default.weight": "up",
        "vapt_scale.default.weight": "scale",
    }
    shared = {
        names[name.split(".", 3)[3]]: tensor for name, tensor in trained.items() if name.startswith(PROMPT_CHILD)
    }
    found = []
    for index in range(DEPTH):
        own = {
            names[name.split(f".{PROMPT_CHILD}.")[1]]: tensor
            for name, tensor in trained.items()
            if name.startswith(f"{blocks}.{index}.")
        }
        found.append(Block(**own if "prompts" in own else {**shared, **own}))
    return found


def read(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def gradients(output: Tensor, trained: dict[str, Any]) -> dict[str, Tensor]:
    """Of a random functional, so that every output is heard."""
    ears = noise(output.shape, torch.Generator().manual_seed(11))
    return dict(zip(trained, torch.autograd.grad((ears * output).sum(), list(trained.values())), strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the size of what is expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check(tower: Tower, vapt: Vapt, monkeypatch: pytest.MonkeyPatch) -> None:
    if tower.eager is not None:
        # transformers' eager softmax goes through float32, where the order of the columns shows at 1e-7.
        module = importlib.import_module(f"transformers.models.{tower.eager}.modeling_{tower.eager}")
        monkeypatch.setattr(module, "nn", NN_WITH_FLOAT64_SOFTMAX())
    base = make_model(tower)
    plain = copy.deepcopy(base)
    model = make_peft_model(base, tower, vapt)
    images = noise(torch.Size([BATCH, 3, *tower.pixels]), torch.Generator().manual_seed(3))

    ours = trained_tensors(model)
    copies = {name: weight.detach().clone().requires_grad_() for name, weight in ours.items()}
    heads = {name.replace(".modules_to_save.default", ""): name for name in copies if "vapt_" not in name}
    with torch.no_grad():
        for path, name in heads.items():
            plain.get_parameter(path).copy_(copies[name])
            copies[name] = plain.get_parameter(path)
        without = read(plain(images))
    blocks, tensors = list(plain.get_submodule(tower.blocks)), block_tensors(copies, tower.blocks)
    for block in blocks:
        if hasattr(getattr(block, "attn", None), "num_prefix_tokens"):  # where timm counts what it does not rotate
            block.attn.num_prefix_tokens += vapt.num_virtual_tokens
    with prompted_blocks(blocks, tensors, vapt, tower.prefix, tower.grid, tower.masked):
        expected = read(plain(images))
    expected_gradients = gradients(expected, copies)

    found = read(model.train()(images))
    assert found.dtype == torch.float64
    found_gradients = gradients(found, ours)
    with torch.no_grad():
        evaluated = read(model.eval()(images))

    assert error(without, expected) > PROMPTS_MATTER
    errors = {"training": error(found, expected), "evaluation": error(evaluated, expected)}
    for name, gradient in expected_gradients.items():
        if not vapt.use_projector and name.endswith("token_prompts.default.bias"):
            # One number on all channels, which the block's norm takes out again unless a projector has spread it.
            assert gradient.abs().max() < 1e-12 and found_gradients[name].abs().max() < 1e-12
            continue
        assert gradient.abs().max() > 1e-6, f"{name} does not matter"
        errors[name] = error(found_gradients[name], gradient)
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= TOLERANCE}
    assert not wrong, f"off by {wrong}"


@pytest.mark.parametrize("setting", EVERYWHERE)
@pytest.mark.parametrize("name", TOWERS)
def test_equals_oracle(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(TOWERS[name], EVERYWHERE[setting], monkeypatch)


# A grid that is not square tells rows from columns; what a setting does, it does in all towers alike.
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["vit_wide", "timm_wide"])
def test_settings(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(TOWERS[name], SETTINGS[setting], monkeypatch)


@pytest.mark.parametrize("name", MORE_TOWERS)
def test_blocks_of_other_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(MORE_TOWERS[name], DEFAULT, monkeypatch)
