# SPDX-License-Identifier: Apache-2.0
"""The denoiser learns to denoise, and what its loss guards against happens without the guard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_promptmoe import ProMotionConfig
from peft_promptmoe.promotion.denoiser import add_noise, denoise, denoising_loss, first_images
from peft_promptmoe.promotion.layer import _denoiser

UNIT, RANK = 32, 4


def planted(basis: Tensor, generator: torch.Generator) -> Tensor:
    """(8, 64, d) patches of a subspace of four dimensions."""
    return torch.randn(8, 64, RANK, generator=generator) @ basis.T


def learn(kind: str, steps: int = 300) -> float:
    """Denoising loss over the noise's variance, the mean of the last twenty steps."""
    config = ProMotionConfig(denoiser=kind, bottleneck_dim=UNIT)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(UNIT, RANK, generator=generator))[0]
    tensors = {name: nn.Parameter(tensor) for name, tensor in _denoiser(config).items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-2)
    ratios = []
    for _ in range(steps):
        clean = planted(basis, generator)
        noisy = add_noise(clean, 1.0, torch.randn(clean.shape, generator=generator))
        loss = denoising_loss(denoise(noisy, dict(tensors), config.denoise_steps, config.num_heads), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ratios.append(float(loss.detach()))
    return sum(ratios[-20:]) / 20


@pytest.mark.parametrize("kind", ["both", "tokens", "attention"])
def test_noise_is_taken_away_from_a_planted_subspace(kind: str) -> None:
    ratio = learn(kind)
    print(f"{kind}: L_dn / sigma^2 {ratio:.3f}")
    assert ratio < {"both": 0.35, "tokens": 0.35, "attention": 0.6}[kind]


def test_at_first_a_step_hardly_changes_anything() -> None:
    tensors, z = _denoiser(ProMotionConfig(bottleneck_dim=UNIT)), torch.randn(2, 9, UNIT)
    change = (denoise(z, tensors, 1, 1) - z).norm() / z.norm()
    assert 0.0 < change < 0.1


def compressed(detached: bool) -> float:
    """How much of the patches' energy is left when the compression learns from the denoising loss alone."""
    torch.manual_seed(0)
    x, down = torch.randn(8, 64, UNIT), nn.Linear(UNIT, UNIT, bias=False)
    energy = down(x).square().mean().item()
    optimizer = torch.optim.Adam(down.parameters(), lr=1e-2)
    for _ in range(100):
        z = down(x)
        clean = z.detach() if detached else z
        noisy = add_noise(clean, 1.0, torch.randn_like(clean))
        # Energy is not divided by here, so that shrinking pays.
        loss = denoising_loss(noisy, clean) * (clean.detach() if detached else clean).square().mean()
        if loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return down(x).square().mean().item() / energy


def test_patches_would_vanish_if_the_clean_ones_were_no_fixed_target() -> None:
    assert compressed(detached=True) == 1.0
    assert compressed(detached=False) < 0.5


def test_the_clean_patches_are_no_path_for_the_gradient() -> None:
    clean, found = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    denoising_loss(found, clean).backward()
    assert clean.grad is None and found.grad is not None and found.grad.abs().max() > 0


def test_patches_of_zeros_have_no_loss_that_is_not_finite() -> None:
    zero = torch.zeros(1, 4, 8)
    assert denoising_loss(add_noise(zero, 1.0, torch.randn(1, 4, 8)), zero).item() == 0.0


@pytest.mark.parametrize(("images", "share", "count"), [(8, 0.25, 2), (1, 0.25, 1), (3, 0.25, 1), (7, 1.0, 7)])
def test_a_share_of_the_images_is_at_least_one(images: int, share: float, count: int) -> None:
    assert first_images(images, share) == count
