# SPDX-License-Identifier: Apache-2.0
"""ProMotion in the package against the loop-written oracle: outputs and every gradient, in float64."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import timm
import torch
from peft import get_peft_model
from promotion_oracle import Settings, Unit, sinkhorn, units_behind
from test_vapt_parity import PATCH, TOWERS, Tower
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification, Swinv2Config, Swinv2ForImageClassification

from peft_promptmoe import ProMotionConfig
from peft_promptmoe.promotion import denoiser, prototypes

TOLERANCE = 1e-10
MATTERS = 1e-3
CHILD = "promptmoe"

TABLE: dict[str, Any] = {
    "default": ("vit", {}),
    "dinov2": ("dinov2", {}),
    "timm": ("timm", {}),
    "timm_average": ("timm_average", {}),
    "one_head": ("vit", {"num_heads": 1}),
    "attention_only": ("vit", {"denoiser": "attention"}),
    "tokens_only": ("vit", {"denoiser": "tokens"}),
    "no_denoiser": ("vit", {"denoise_steps": 0}),
    "not_centred": ("vit", {"center": False}),
    "softmax": ("vit", {"balance": 0.0}),
    "half_balanced": ("vit", {"balance": 0.5}),
    "top_1": ("vit", {"read_top": 1}),
    "top_2": ("vit", {"read_top": 2}),
    "no_feedback": ("vit", {"feedback": False}),
    "one_prototype": ("vit", {"num_prototypes": 1}),
    "pool": ("vit_wide", {"proposal": "pool", "num_prototypes": 4}),
}


def tower(name: str) -> Tower:
    return TOWERS[name]


def plain(name: str) -> nn.Module:
    torch.manual_seed(3)
    return shaken(tower(name).build())


def shaken(model: nn.Module) -> nn.Module:
    """Random weights by which every token matters, in float64."""
    model = model.double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.add_(0.1 * noise) if weight.ndim == 1 else weight.copy_(0.25 * noise)
    return model


def pixels(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 3, *tower(name).pixels, dtype=torch.float64, generator=generator)


def unit_of(layer: Any) -> Unit:
    steps = layer.promotion_denoiser.named_parameters()
    bank = layer.promotion_bank["default"].weight if "default" in layer.promotion_bank else None
    return Unit(
        gain=layer.promotion_norm["default"].weight,
        shift=layer.promotion_norm["default"].bias,
        down=layer.promotion_down["default"].weight,
        down_bias=layer.promotion_down["default"].bias,
        denoiser={name.removeprefix("default."): tensor for name, tensor in steps},
        project=layer.promotion_project["default"].weight,
        bank=bank,
        up=layer.promotion_up["default"].weight,
        up_bias=layer.promotion_up["default"].bias,
    )


def answer(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output.logits if hasattr(output, "logits") else output


@pytest.mark.parametrize("name", TABLE)
def test_equals_oracle(name: str) -> None:
    where, changes = TABLE[name]
    grid = (tower(where).pixels[0] // PATCH, tower(where).pixels[1] // PATCH)
    base = plain(where)
    blocks: Any = base.get_submodule(tower(where).blocks)
    compare(base, list(blocks), [0, 1, 2], tower(where).prefix, [grid] * 3, changes, pixels(where))


SWIN: dict[str, Any] = {"patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 3}
STAGED = {
    "swin": lambda: SwinForImageClassification(SwinConfig(num_labels=3, **SWIN)),
    "swinv2": lambda: Swinv2ForImageClassification(Swinv2Config(num_labels=3, **SWIN)),
    "timm_swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(14, 18), always_partition=True, num_classes=3, **SWIN
    ),
    "timm_swinv2": lambda: timm.create_model(
        "swinv2_tiny_window8_256", img_size=(14, 18), always_partition=True, num_classes=3, **SWIN
    ),
}


@pytest.mark.parametrize("name", STAGED)
def test_equals_oracle_in_stages(name: str) -> None:
    """Behind the third block, the only one of the second stage. Its grid is no multiple of the window: Swin pads."""
    torch.manual_seed(3)
    base = shaken(STAGED[name]())
    blocks = [module for path, module in base.named_modules() if re.fullmatch(r".*layers\.1\.blocks\.0", path)]
    images = torch.randn(2, 3, 14, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    changes = {"proposal": "pool", "num_prototypes": 4}
    compare(base, blocks, [2], 0, [(4, 5)], changes, images)


def compare(
    base: nn.Module,
    blocks: list[nn.Module],
    numbers: list[int],
    prefix: int,
    grids: list[tuple[int, int]],
    changes: dict[str, Any],
    images: Tensor,
) -> None:
    """Outputs and gradients of a model with units behind `blocks`, which have these numbers, against the oracle."""
    settings = Settings(**changes)
    paths = {id(module): path for path, module in base.named_modules()}
    oracle_base = copy.deepcopy(base)
    oracle_blocks = [oracle_base.get_submodule(paths[id(block)]) for block in blocks]
    torch.manual_seed(5)
    config = ProMotionConfig(
        **dataclasses.asdict(settings),
        init_weights=False,
        modules_to_save=[],
        layers_to_transform=numbers,
        denoise_weight=0.0,
    )
    model = get_peft_model(base, config).double().eval()
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "promotion_up")]
    assert len(layers) == len(blocks)
    units = [unit_of(layer) for layer in layers]
    weights = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    trained = [p for p in model.parameters() if p.requires_grad]

    found = answer(model, images)
    grads = torch.autograd.grad((found * weights).sum(), trained, allow_unused=True)
    with units_behind(oracle_blocks, units, settings, prefix, grids):
        expected = answer(oracle_base, images)
        wanted = torch.autograd.grad((expected * weights).sum(), trained, allow_unused=True)
    with torch.no_grad():
        assert (answer(oracle_base, images) - expected).abs().max() > MATTERS
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert any(gradient is not None and gradient.abs().max() > MATTERS for gradient in wanted)
    for weight, gradient, right in zip(trained, grads, wanted, strict=True):
        pair = [torch.zeros_like(weight) if each is None else each for each in (gradient, right)]
        torch.testing.assert_close(*pair, rtol=1e-8, atol=TOLERANCE)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# -- function by function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rounds", [1, 3, 50])
def test_sinkhorn_equals_probabilities_by_loops(balance: float, rounds: int) -> None:
    scores = normal(2, 7, 3)
    found = prototypes.sinkhorn(scores, rounds, balance)
    for image, share in zip(scores, found, strict=True):
        expected = torch.tensor(sinkhorn(image.tolist(), rounds, balance), dtype=torch.float64)
        torch.testing.assert_close(share, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_margin_and_compactness_by_loops() -> None:
    similarity, assigned = normal(2, 5, 4).tanh(), torch.randint(4, (2, 5))
    margin, temperature = 0.2, 0.1
    cross, compact = [], []
    for image in range(2):
        for patch in range(5):
            own = int(assigned[image, patch])
            scores = [(float(similarity[image, patch, k]) - margin * (k == own)) / temperature for k in range(4)]
            cross.append(-scores[own] + torch.tensor(scores, dtype=torch.float64).logsumexp(0).item())
            compact.append((1 - float(similarity[image, patch, own])) ** 2)
    found = prototypes.margin_loss(similarity, assigned, margin, temperature)
    assert found.item() == pytest.approx(sum(cross) / 10, rel=TOLERANCE)
    assert prototypes.compactness(similarity, assigned).item() == pytest.approx(sum(compact) / 10, rel=TOLERANCE)


def test_noise_and_denoising_loss_by_loops() -> None:
    z, noise, std = normal(2, 5, 4), normal(2, 5, 4), 0.7
    found = denoiser.add_noise(z, std, noise)
    for image in range(2):
        for patch in range(5):
            rms = (sum(float(value) ** 2 for value in z[image, patch]) / 4) ** 0.5
            for channel in range(4):
                expected = float(z[image, patch, channel]) + std * rms * float(noise[image, patch, channel])
                assert found[image, patch, channel].item() == pytest.approx(expected, rel=TOLERANCE)
    guess = normal(2, 5, 4)
    error = sum(float((a - b) ** 2) for a, b in zip(guess.flatten(), z.flatten(), strict=True))
    energy = sum(float(value) ** 2 for value in z.flatten())
    assert denoiser.denoising_loss(guess, z).item() == pytest.approx(error / energy, rel=TOLERANCE)


def test_leaving_the_noise_in_scores_with_its_variance() -> None:
    z = normal(8, 500, 16)
    for std in (0.1, 1.0, 2.0):
        noisy = denoiser.add_noise(z, std, torch.randn_like(z))
        assert denoiser.denoising_loss(noisy, z).item() == pytest.approx(std**2, rel=0.02)
