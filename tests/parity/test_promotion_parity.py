# SPDX-License-Identifier: Apache-2.0
"""ProMotion in the package against the loop-written oracle: outputs and every gradient, in float64."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from peft import get_peft_model
from promotion_oracle import Settings, Unit, sinkhorn, units_behind
from test_vapt_parity import PATCH, TOWERS, Tower
from torch import Tensor, nn

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
    model = tower(name).build().double().eval()
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
    settings = Settings(**changes)
    base = plain(where)
    oracle_base = copy.deepcopy(base)
    given = dataclasses.asdict(settings)
    depth = 3
    torch.manual_seed(5)
    config = ProMotionConfig(
        **given, init_weights=False, modules_to_save=[], layers_to_transform=list(range(depth)), denoise_weight=0.0
    )
    model = get_peft_model(base, config).double().eval()
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "promotion_up")]
    assert len(layers) == depth
    units = [unit_of(layer) for layer in layers]
    blocks = list(oracle_base.get_submodule(tower(where).blocks))
    images = pixels(where)
    weights = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    trained = [p for p in model.parameters() if p.requires_grad]

    found = answer(model, images)
    grads = torch.autograd.grad((found * weights).sum(), trained, allow_unused=True)
    grid = (tower(where).pixels[0] // PATCH, tower(where).pixels[1] // PATCH)
    with units_behind(blocks, units, settings, tower(where).prefix, grid):
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
