# SPDX-License-Identifier: Apache-2.0
"""The unit behind one frozen block: compress, denoise, group around prototypes, read them back, expand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter_state import AffineTable, PromptTable, TensorGroup
from ..engine.block_layer import BlockLayer
from ..models.patches import Grid
from ..models.sites import Site
from ..routing.auxiliary_loss import carry_loss
from ..routing.record import Assignment
from ..routing.router import routing_dtype, without_autocast
from .bank import PrototypeBank, finish
from .config import ProMotionConfig
from .denoiser import add_noise, denoise, denoising_loss, draw_noise, first_images
from .prototypes import (
    compactness,
    cosines,
    directions,
    estimate,
    margin_loss,
    pool_proposals,
    read_back,
    unit_rows,
)

NORM_EPS = 1e-5
GAIN = 0.1  # initial gain of the denoiser's attention
BANK = "promotion_bank"


class ProMotionLayer(BlockLayer):
    """The units behind one frozen block, one per adapter. Each adds to the block's outputs at the patches.

    Trained tensors per adapter: `promotion_norm` (D,) twice, `promotion_down` weight (d, D) and bias (d,),
    `promotion_denoiser` (see `denoise`), `promotion_project` (d, d), `promotion_up` weight (D, d) and bias (D,).
    Saved with them, but not trained by gradients: `promotion_bank` (K, d).

    Attributes:
        units: for each adapter, the number of layers of the model that have a unit.
    """

    adapter_layer_names = (
        "promotion_norm",
        "promotion_down",
        "promotion_denoiser",
        "promotion_project",
        "promotion_up",
    )
    # Not in `adapter_layer_names`: PEFT makes those require gradients, and a bank never has one.
    other_param_names = (*BlockLayer.other_param_names, BANK, "last_assignment", "units")
    method = "ProMotion"
    unrouted = "groups patches and has no router; assignment_report and AssignmentCallback show the groups"
    joins_as = "its units add to the outputs of blocks"

    promotion_norm: nn.ModuleDict
    promotion_down: nn.ModuleDict
    promotion_denoiser: nn.ModuleDict
    promotion_project: nn.ModuleDict
    promotion_up: nn.ModuleDict
    promotion_bank: nn.ModuleDict

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.units: dict[str, int] = {}
        for name in (*self.adapter_layer_names, BANK):
            self.add_module(name, nn.ModuleDict())

    def update_layer(self, adapter: str, config: ProMotionConfig) -> None:
        width, unit = self.site.width, config.bottleneck_dim
        self.prompt_config[adapter] = config
        self.promotion_norm[adapter] = AffineTable(torch.ones(width), torch.zeros(width))
        down, up = nn.Linear(width, unit), nn.Linear(unit, width)
        self.promotion_down[adapter] = AffineTable(down.weight.detach(), down.bias.detach())
        if config.denoise_steps:
            self.promotion_denoiser[adapter] = TensorGroup(_denoiser(config))
        self.promotion_project[adapter] = PromptTable(nn.init.orthogonal_(torch.empty(unit, unit)))
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.promotion_up[adapter] = AffineTable(up.weight.detach(), up.bias.detach())
        if config.proposal == "bank":
            momentum = config.bank_momentum
            assert momentum is not None
            self.promotion_bank[adapter] = PrototypeBank(
                config.num_prototypes, unit, momentum, config.reseed_after, random=not config.init_weights
            )

    # -- the unit -----------------------------------------------------------------------------------------------------

    def adds_losses(self, adapter: str) -> bool:
        config = self.prompt_config[adapter]
        weights = (config.denoise_weight, config.margin_weight, config.compact_weight)
        return self.leaves_word(adapter) and any(weights)

    def behind(self, x: Tensor, grid: Grid | None = None) -> Tensor | None:
        adapters = self.working_adapters()
        if not adapters:
            return None
        prefix = self.patches.prefix
        patches = x[:, prefix:]
        changed = patches
        for name in adapters:
            changed = changed + self._added(name, self.prompt_config[name], patches, grid).to(x.dtype)
        return torch.cat([x[:, :prefix], changed], dim=1) if prefix else changed

    def _added(self, adapter: str, config: ProMotionConfig, x: Tensor, grid: Grid | None) -> Tensor:
        """What one adapter adds to patches x, both (B, N, D)."""
        check_count(config, self.site, x.shape[1], grid)
        learns = self.leaves_word(adapter)
        z = self._compress(adapter, x)
        tensors = self.promotion_denoiser[adapter]() if config.denoise_steps else {}
        values: dict[str, Tensor] = {}
        if learns and config.denoise_weight:
            values |= self._denoising_losses(config, z, tensors)
        carried = add_noise(z, config.noise_std, draw_noise(z)) if learns and config.noisy_features else z
        found = denoise(carried, tensors, config.denoise_steps, config.num_heads)
        with without_autocast(x):
            found = found.to(routing_dtype(found))
            read, grouping = self._prototypes(adapter, config, found, grid, learns)
            values |= grouping
            features = (found + read if config.feedback else found).to(z.dtype)
        weight, bias = self.promotion_up[adapter]()
        scale = config.unit_scale
        assert scale is not None
        added = F.linear(features * scale, weight.to(x.dtype), bias.to(x.dtype) * scale)
        weights = {"denoise": config.denoise_weight, "margin": config.margin_weight, "compact": config.compact_weight}
        terms = [weight * values[name] for name, weight in weights.items() if weight and name in values]
        if not terms:
            return added
        term = torch.stack(terms).sum() / self.units[adapter]
        return carry_loss(added, term, self.calls, self.calls.call, self.site.name, adapter, values)

    def _compress(self, adapter: str, x: Tensor) -> Tensor:
        """Normed and compressed patches, (B, N, d)."""
        gain, shift = self.promotion_norm[adapter]()
        weight, bias = self.promotion_down[adapter]()
        normed = F.layer_norm(x, x.shape[-1:], gain.to(x.dtype), shift.to(x.dtype), NORM_EPS)
        return F.linear(normed, weight.to(normed.dtype), bias.to(normed.dtype))

    def _denoising_losses(self, config: ProMotionConfig, z: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        clean = z[: first_images(z.shape[0], config.denoise_share)].detach()
        noisy = add_noise(clean, config.noise_std, draw_noise(clean))
        loss = denoising_loss(denoise(noisy, tensors, config.denoise_steps, config.num_heads), clean)
        return {"denoise": loss, "denoise_ratio": loss.detach() / config.noise_std**2}

    def _prototypes(
        self, adapter: str, config: ProMotionConfig, found: Tensor, grid: Grid | None, learns: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What patches read from the prototypes, (B, N, d), and the losses of the grouping."""
        u = directions(found, self.promotion_project[adapter](), config.center)
        start = self._start(adapter, config, u.detach(), grid, learns)
        prototypes, assignment = estimate(
            u, start, config.estimation_rounds, config.sinkhorn_eps, config.sinkhorn_rounds, config.balance
        )
        similarity = cosines(u, prototypes)
        read = read_back(similarity, prototypes, config.read_temperature, config.read_top)
        is_first_pass = self.calls.call is not None
        if is_first_pass or not learns:
            self.last_assignment[adapter] = Assignment(similarity.detach(), prototypes.detach(), grid)
        if not learns:
            return read, {}
        assigned = assignment.argmax(dim=-1)
        if is_first_pass and config.proposal == "bank":
            self._leave(adapter, start[0], u.detach(), similarity.detach(), assignment, assigned)
        losses = {
            "margin": margin_loss(similarity, assigned, config.margin, config.margin_temperature),
            "compact": compactness(similarity, assigned),
        }
        return read, losses

    def _start(self, adapter: str, config: ProMotionConfig, u: Tensor, grid: Grid | None, learns: bool) -> Tensor:
        """Initial prototypes, (B or 1, K, d)."""
        if config.proposal == "pool":
            assert grid is not None
            return pool_proposals(u, grid, config.num_prototypes)
        bank: Any = self.promotion_bank[adapter]
        if learns and bank.may_be_unstarted:
            return bank.start(u.flatten(0, 1))[None].to(u.dtype)
        return unit_rows(bank())[None].to(u.dtype)

    def _leave(self, adapter: str, *seen: Tensor) -> None:
        bank: Any = self.promotion_bank[adapter]
        if bank.momentum < 1.0 or bank.may_be_unstarted:
            bank.leave(*seen)

    # -- what the engine asks -----------------------------------------------------------------------------------------

    def needs_patches(self, adapter: str) -> bool:
        return self.patches.stage is None  # blocks in stages are called with their grid, and no patch is dropped

    def uses_grid(self, adapter: str) -> bool:
        return bool(self.prompt_config[adapter].proposal == "pool")

    def leaves_word(self, adapter: str) -> bool:
        """Whether the adapter trains here: in training mode, not frozen, and not in inference mode."""
        up: Any = self.promotion_up[adapter]
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        return self.training and bool(up.weight.requires_grad) and not inference

    def meet(self, layers: list[Any]) -> None:
        units = [layer for layer in layers if isinstance(layer, ProMotionLayer)]
        self.units = {name: sum(name in layer.prompt_config for layer in units) for name in self.prompt_config}

    def settle(self) -> None:
        for bank in self._banks(list(self.promotion_bank)):
            bank.settle()

    @classmethod
    def before_training(cls, layers: list[Any]) -> None:
        for layer in layers:
            for bank in layer._banks(layer.working_adapters()):
                bank.begin()

    @classmethod
    def after_training(cls, layers: list[Any]) -> None:
        finish([bank for layer in layers for bank in layer._banks(layer.working_adapters())])

    def _banks(self, adapters: list[str]) -> list[Any]:
        return [self.promotion_bank[name] for name in adapters if name in self.promotion_bank]


def check_count(config: ProMotionConfig, site: Site, patches: int, grid: Grid | None) -> None:
    """Raise ValueError if each prototype of a unit would get less than four patches of an image."""
    if 4 * config.num_prototypes <= patches:
        return
    stage = site.patches.stage if site.patches is not None else None
    shape = f"{patches} patches" + (f" ({grid[0]} x {grid[1]})" if grid is not None else "")
    where, instead = "", ""
    if stage is not None:
        where = f" behind block {site.index}, in stage {stage + 1} of the model"
        instead = f" (at most {patches // 4}), only earlier blocks (layers_to_transform)"
    raise ValueError(
        f"num_prototypes={config.num_prototypes} is more than a quarter of an image's {shape}{where}, so each gets "
        f"too few patches. Choose fewer prototypes{instead}, or larger images."
    )


def _denoiser(config: ProMotionConfig) -> dict[str, Tensor]:
    """Tensors of all denoising steps, initialised so that the steps change little."""
    steps, unit = config.denoise_steps, config.bottleneck_dim
    tensors: dict[str, Tensor] = {}
    if config.has_attention:
        linear = [nn.Linear(unit, unit, bias=False).weight.detach() for _ in range(2 * steps)]
        tensors |= {"subspace": torch.stack(linear[:steps]), "output": torch.stack(linear[steps:])}
        tensors["gain"] = torch.full((steps,), GAIN)
    if config.has_token_map:
        hidden = [nn.Linear(unit, 2 * unit) for _ in range(steps)]
        tensors["hidden_weight"] = torch.stack([layer.weight.detach() for layer in hidden])
        tensors["hidden_bias"] = torch.stack([layer.bias.detach() for layer in hidden])
        tensors["token_weight"] = torch.zeros(steps, unit, 2 * unit)
        tensors["token_bias"] = torch.zeros(steps, unit)
        if not config.init_weights:
            tensors["token_weight"] = torch.randn(steps, unit, 2 * unit) / unit
    return tensors
