# SPDX-License-Identifier: Apache-2.0
"""pMoE in the package against the loop-written oracle: logits and every gradient, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import get_peft_model
from pmoe_oracle import Expert, Mixture, prompted_experts, read_features
from test_vapt_parity import error, gradients, noise, trained_tensors
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from peft_promptmoe import PMoEConfig, VAPTConfig

TOLERANCE = 1e-10
PROMPTS, BATCH, CLASSES, PIXELS = 3, 2, 3, 24


@dataclass(frozen=True)
class Tower:
    """A tiny model and what the oracle has to know of it.

    Attributes:
        build: makes it; base models have a classifier.
        blocks: path of its blocks.
        prefix: tokens in front of the patches.
        feature: of a further expert, from the plain model and the images.
        pixels: rows and columns that it wants.
    """

    build: Callable[[], nn.Module]
    blocks: str
    prefix: int = 1
    feature: Callable[[Any, Tensor], Tensor] = lambda model, images: model(images).last_hidden_state[:, 0]
    pixels: int = PIXELS


def shape(width: int = 32, depth: int = 3, pixels: int = PIXELS) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": pixels,
        "patch_size": 8,
    }


def from_timm(width: int, depth: int, classes: int, **settings: Any) -> nn.Module:
    sizes = {"img_size": PIXELS, "patch_size": 12, "embed_dim": width, "depth": depth, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes, **settings)


def timm_feature(model: Any, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


BASES: dict[str, Tower] = {
    "vit": Tower(lambda: ViTForImageClassification(ViTConfig(num_labels=CLASSES, **shape())), "vit.layers"),
    "timm": Tower(lambda: from_timm(32, 3, CLASSES), "blocks"),
}
VIT = Tower(lambda: ViTModel(ViTConfig(**shape()), add_pooling_layer=False), "layers")
REGISTERS = Tower(
    lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=2, **shape())), "encoder.layer", 3
)
NARROW = Tower(lambda: ViTModel(ViTConfig(**shape(24, 2, 32)), add_pooling_layer=False), "layers", pixels=32)
AVERAGE = Tower(
    lambda: from_timm(16, 5, 0, class_token=False, global_pool="avg"), "blocks", prefix=0, feature=timm_feature
)

# Two and three experts of one width and depth, and of several.
MIXTURES: dict[str, list[Tower]] = {
    "two_equal": [VIT],
    "three_equal": [VIT, REGISTERS],
    "two_different": [NARROW],
    "three_different": [NARROW, AVERAGE],
}
DISPATCHERS = ("token", "expert", "attention", "mean", "none")


@torch.no_grad()
def make(tower: Tower, seed: int) -> nn.Module:
    """A random model with weights large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    model, generator = tower.build().double().eval(), torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = noise(weight.shape, generator)
        if weight.ndim == 1:
            weight.add_(0.2 * drawn)
        elif "pos" in name or "token" in name:
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
        if "bias" in name:
            weight.copy_(drawn)
        elif "prompts" in name or "dispatcher" in name:
            weight.copy_(0.7 * drawn)
        else:
            weight.copy_(drawn / weight.shape[-1] ** 0.5)


def plain_expert(plain: nn.Module, tower: Tower, tensors: dict[str, Tensor], places: list[str]) -> Expert:
    """The oracle's view on one expert's tensors, found by the beginnings of their names."""
    prompts, dispatchers = [], []
    for place in places:
        own = {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}
        prompts.append(own.pop("pmoe_prompts.default.weight"))
        dispatchers.append({name.removeprefix("pmoe_dispatcher.default."): tensor for name, tensor in own.items()})
    return Expert(list(plain.get_submodule(tower.blocks)), tower.prefix, prompts, dispatchers)


def attention_paths(model: Any) -> list[str]:
    """Where the base model's prompts are, in the order of its blocks."""
    ending = ".pmoe_prompts"
    found = [name.removesuffix("pmoe_prompts") for name, _ in model.named_modules() if name.endswith(ending)]
    return [name for name in found if not name.startswith("promptmoe.")]


def expect(
    plain: list[nn.Module], towers: list[Tower], mixture: Mixture, fusion: str, images: Tensor, maps: Tensor | None
) -> Tensor:
    """The oracle's logits."""
    model: Any = plain[0]
    head = model.classifier if hasattr(model, "classifier") else model.head
    features: list[Tensor] = []
    caught = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    with prompted_experts(mixture):
        model(images)
        caught.remove()
        for encoder, tower in zip(plain[1:], towers[1:], strict=True):
            size = (tower.pixels, tower.pixels)
            fitted = images
            if tower.pixels != PIXELS:
                fitted = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
            features.append(tower.feature(encoder, fitted))
    return read_features(features, fusion, (head.weight, head.bias), maps)


def check(base: str, names: str, dispatcher: str, carry: bool = True, fusion: str = "concat") -> None:
    towers = [BASES[base], *MIXTURES[names]]
    models = [make(tower, seed) for seed, tower in enumerate(towers)]
    plain = copy.deepcopy(models)
    settings = {"dispatcher": dispatcher, "carry_prompts": carry, "fusion": fusion, "dispatcher_dim": 5}
    config = PMoEConfig(experts=models[1:], num_virtual_tokens=PROMPTS, init_weights=False, **settings)
    model = get_peft_model(models[0], config).double()
    ours = trained_tensors(model)
    fill(ours)
    copies = {name: weight.detach().clone().requires_grad_() for name, weight in ours.items()}
    with torch.no_grad():
        for name in [name for name in copies if ".modules_to_save.default" in name]:
            weight = plain[0].get_parameter(name.replace(".modules_to_save.default", ""))
            weight.copy_(copies[name])
            copies[name] = weight.requires_grad_()

    shared = "promptmoe.shared.pMoE."
    keys = [f"e{record['weights'][:12]}" for record in model.peft_config["default"].expert_records]
    places = [attention_paths(models[0])]
    for key, tower, encoder in zip(keys, towers[1:], plain[1:], strict=True):
        depth = len(list(encoder.get_submodule(tower.blocks)))
        places.append([f"{shared}layers.{key}.{block}." for block in range(depth)])
    experts = [plain_expert(*each[:2], copies, each[2]) for each in zip(plain, towers, places, strict=True)]
    bridge = f"{shared}pmoe_bridges.default.weight_"
    bridges = {
        (j, k): copies[f"{bridge}{j}_to_{k}"]
        for j in range(len(experts))
        for k in range(len(experts))
        if f"{bridge}{j}_to_{k}" in copies
    }
    mixture = Mixture(experts, dispatcher, carry, bridges)
    images = noise(torch.Size([BATCH, 3, PIXELS, PIXELS]), torch.Generator().manual_seed(3))
    maps = copies.get(f"{shared}pmoe_fusion.default.weight")

    expected = expect(plain, towers, mixture, fusion, images, maps)
    expected_gradients = gradients(expected, copies)
    found = read(model.train()(images))
    assert found.dtype == torch.float64
    found_gradients = gradients(found, ours)
    with torch.no_grad():
        evaluated = read(model.eval()(images))

    errors = {"training": error(found, expected), "evaluation": error(evaluated, expected)}
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 1e-7, f"{name} does not matter"
        errors[name] = error(found_gradients[name], gradient)
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= TOLERANCE}
    assert not wrong, f"off by {wrong}"


def read(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"]


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("names", MIXTURES)
def test_equals_oracle(names: str, dispatcher: str) -> None:
    check("vit", names, dispatcher)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_on_timm(dispatcher: str) -> None:
    check("timm", "three_different", dispatcher)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_every_block_anew(dispatcher: str) -> None:
    check("vit", "three_different", dispatcher, carry=False)


@pytest.mark.parametrize("fusion", ["mean", "logits"])
def test_fusion(fusion: str) -> None:
    check("vit", "three_equal", "token", fusion=fusion)


@pytest.mark.parametrize("tower", ["vit", "timm", "dinov2"])
def test_one_expert_without_dispatcher_is_deep_prompt_tuning(tower: str) -> None:
    """Whose prompts are carried on, or, where they are not, start anew in every block as in VPT-Deep."""
    towers = BASES | {
        "dinov2": Tower(
            lambda: Dinov2ForImageClassification(Dinov2Config(num_labels=CLASSES, **shape())), "dinov2.encoder.layer"
        )
    }
    images = noise(torch.Size([BATCH, 3, PIXELS, PIXELS]), torch.Generator().manual_seed(3))

    def outcome(config: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model = get_peft_model(make(towers[tower], 0), config).double().eval()
        ours = trained_tensors(model)
        prompts = {name.split(".promptmoe.")[0]: name for name in ours if ".promptmoe." in name}
        assert all(name.endswith("_prompts.default.weight") for name in prompts.values())
        with torch.no_grad():
            for number, place in enumerate(sorted(prompts)):
                ours[prompts[place]].copy_(noise(ours[prompts[place]].shape, torch.Generator().manual_seed(number)))
        logits = read(model(images))
        found = gradients(logits, ours)
        return logits, {place: found[name] for place, name in prompts.items()}

    none = {"experts": [], "dispatcher": "none", "num_virtual_tokens": PROMPTS}
    anew, grads = outcome(PMoEConfig(**none, carry_prompts=False))
    deep, deep_grads = outcome(VAPTConfig(num_virtual_tokens=PROMPTS, num_static_layers="all", prompt_dropout=0.0))
    assert error(anew, deep) <= TOLERANCE
    assert grads.keys() == deep_grads.keys()
    assert max(error(grads[place], deep_grads[place]) for place in grads) <= TOLERANCE

    carried, grads = outcome(PMoEConfig(**none))
    plain = make(towers[tower], 0)
    places = sorted(grads)
    prompts = [
        noise(grads[place].shape, torch.Generator().manual_seed(number)).requires_grad_()
        for number, place in enumerate(places)
    ]
    blocks = list(plain.get_submodule(towers[tower].blocks))
    mixture = Mixture([Expert(blocks, 1, prompts, [{}] * len(blocks))], "none", True, {})
    with prompted_experts(mixture):
        expected = read(plain(images))
    expected_grads = gradients(expected, dict(zip(places, prompts, strict=True)))
    assert error(carried, expected) <= TOLERANCE and error(anew, expected) > 1e-2
    assert max(error(grads[place], expected_grads[place]) for place in places) <= TOLERANCE
