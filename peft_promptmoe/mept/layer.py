# SPDX-License-Identifier: Apache-2.0
"""The MEPT layer: prompt experts and router of one attention layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter_state import PromptTable
from ..config import PromptConfig
from ..engine.key_value import KeyValueLayer
from ..models.sites import Site
from ..routing.auxiliary_loss import carry_loss
from ..routing.balance_loss import BALANCE, balance_loss
from ..routing.prompt_call import PromptCall
from ..routing.record import Chosen
from ..routing.router import (
    best_gates,
    mix_experts,
    perturb,
    pooled_input,
    token_logits,
    top_k_log_gates,
    without_autocast,
)
from ..sharing.rollback import is_loading
from .center import RouterCenter
from .config import MEPTConfig

SHARED_START = 0.1  # initial size of added shared rows, relative to other rows


class MEPTLayer(KeyValueLayer):
    """Routed and shared prompt experts of one attention layer, for any number of adapters.

    Trained tensors per adapter: `mept_prompts` (E, P, D), `mept_shared_prompts` (S, P, D), `mept_router` (E, D).
    """

    adapter_layer_names = ("mept_prompts", "mept_shared_prompts", "mept_router")
    other_param_names = (*KeyValueLayer.other_param_names, "mept_router_center")  # never trained by gradients
    dispensable = ("mept_router_center", "steps")
    method = "MEPT"
    unrouted = "has static prompts and no router with num_experts=1; make it with num_experts of 2 or more"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.mept_prompts = nn.ModuleDict()
        self.mept_shared_prompts = nn.ModuleDict()
        self.mept_router = nn.ModuleDict()
        self.mept_router_center = nn.ModuleDict()

    def update_layer(self, adapter: str, config: MEPTConfig) -> None:
        width, slots = self.site.width, config.num_virtual_tokens
        std = self._initial_std(config) / config.prompt_scale
        self.prompt_config[adapter] = config
        self.mept_prompts[adapter] = PromptTable(random_rows(config.num_experts, slots, width, std))
        if config.num_shared_experts:
            std = std * SHARED_START if shared_are_added(config) else std
            self.mept_shared_prompts[adapter] = PromptTable(random_rows(config.num_shared_experts, slots, width, std))
        if config.num_experts > 1:
            self.mept_router[adapter] = PromptTable(orthogonal_rows(config.num_experts, width))
            if config.router_centering:
                self.mept_router_center[adapter] = RouterCenter(width)

    @torch.no_grad()
    def start_from(self, adapter: str, inputs: Tensor) -> None:
        """Set the rows of an adapter's first N experts to `inputs` (N, P, D). N is `experts_to_start`."""
        config = self.prompt_config[adapter]
        self.mept_prompts[adapter]().copy_(inputs[: config.num_experts] / config.prompt_scale)
        if config.num_shared_experts and not shared_are_added(config):
            self.mept_shared_prompts[adapter]().copy_(inputs[config.num_experts :] / config.prompt_scale)

    @torch.no_grad()
    def static_tables(self, adapter: str) -> Tensor:
        """Rows of an adapter without router, (N, P, D). All have the same weight in attention."""
        config = self.prompt_config[adapter]
        tables = self.mept_prompts[adapter]() * config.prompt_scale
        if not config.num_shared_experts:
            return tables
        shared = self.mept_shared_prompts[adapter]() * config.prompt_scale
        return torch.cat([tables, shared]) if config.routing == "token" else tables + shared.sum(dim=0)

    def _initial_std(self, config: MEPTConfig) -> float:
        if not config.init_weights:
            return 1.0
        if config.init_std == "match":
            return self.site.input_std if self.site.input_std is not None else 1.0
        return float(config.init_std)

    # -- the method ---------------------------------------------------------------------------------------------------

    def rows(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Tensor:
        config = self.prompt_config[adapter]
        experts = self.mept_prompts[adapter]() * config.prompt_scale
        shared = self.mept_shared_prompts[adapter]() * config.prompt_scale if config.num_shared_experts else None
        if config.routing == "token":
            tables = experts if shared is None else torch.cat([experts, shared])
            return tables.flatten(0, 1)[None]
        mixed = self._mix(adapter, experts, x, real, call)
        return mixed if shared is None else mixed + shared.sum(dim=0)

    def _mix(self, adapter: str, experts: Tensor, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Tensor:
        """Gate-weighted sum of the experts chosen by each sample's pooled input, (B or 1, P, D)."""
        config = self.prompt_config[adapter]
        if config.num_experts == 1:
            return experts
        if self.reads_query(adapter) and call is not None:
            real = call.readable(x, real)
        with without_autocast(x):
            pooled = pooled_input(x, real, config.router_norm)
            some = None if real is None else real.any(dim=1)
            center = self._center(adapter, pooled, some, call)
            if center is not None:
                pooled = pooled - center
                pooled = pooled if some is None else pooled * some[:, None]
            weight = self.mept_router[adapter]()
            logits = nn.functional.linear(pooled, weight.to(pooled.dtype))
            logits = self._perturbed(config, logits)
            log_gates, index = top_k_log_gates(logits, config.top_k, config.renormalize_top_k)
            self.note(adapter, log_gates, None)
            if self._balances(config):
                term = config.balance_loss_weight * balance_loss(logits, index, some)
                log_gates = self._carry(log_gates, term, call, adapter)
            return mix_experts(experts, log_gates, index)

    def choice(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Chosen | None:
        config = self.prompt_config[adapter]
        if config.prompt_weights is not None:
            return _of_all(x, config.prompt_weights)
        if config.routing != "token" or config.num_experts == 1:
            return None
        with without_autocast(x):
            center = self._token_center(adapter, x, real, call)
            logits = token_logits(x, self.mept_router[adapter](), center, config.router_norm)
            logits = self._perturbed(config, logits)
            log_gates, experts = best_gates(logits, config.top_k, config.renormalize_top_k)
            self.note(adapter, Chosen(log_gates, experts, config.num_experts), real)
            if self._balances(config):
                term = config.balance_loss_weight * balance_loss(logits, experts, real)
                log_gates = self._carry(log_gates, term, call, adapter)
            return Chosen(log_gates, experts, config.num_experts)

    def _carry(self, log_gates: Tensor, term: Tensor, call: PromptCall | None, adapter: str) -> Tensor:
        return carry_loss(log_gates, term, self.calls, call, self.site.name, adapter, {BALANCE: term})

    def _perturbed(self, config: MEPTConfig, logits: Tensor) -> Tensor:
        return perturb(logits, config.router_noise, config.router_dropout) if self.training else logits

    def _token_center(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Tensor | None:
        if adapter not in self.mept_router_center:
            return None
        pooled = pooled_input(x, real, self.prompt_config[adapter].router_norm) if self.training else x[:, 0]
        return self._center(adapter, pooled, None if real is None else real.any(dim=1), call)

    def _center(self, adapter: str, pooled: Tensor, some: Tensor | None, call: PromptCall | None) -> Tensor | None:
        """The centre to subtract, (D,). A training forward pass updates it once, after reading the old value.

        Forward passes without gradients do not update it. Some trainers generate text in training mode (GRPO), each
        process its own, and the centres of the processes would become different.
        """
        if adapter not in self.mept_router_center:
            return None
        center = self.mept_router_center[adapter]
        assert isinstance(center, RouterCenter)
        if not self.training or not self.mept_router[adapter]().requires_grad:
            return center()
        assert call is not None
        if not call.learns:
            return center()
        key = (self.site.name, adapter)
        if key not in call.centers:
            weight = torch.ones_like(pooled[:, :1]) if some is None else some[:, None].to(pooled.dtype)
            before, known = center().clone(), center.is_known
            # The very first batch is centred by its own mean. A centre of zero would leave the shared direction in.
            call.centers[key] = torch.where(known, before, center.update(pooled, weight))
        return call.centers[key]

    # -- what the engine asks -----------------------------------------------------------------------------------------

    def has_router(self, adapter: str) -> bool:
        return adapter in self.mept_router

    def reads_input(self, adapter: str) -> bool:
        return self.pools_rows(adapter)

    def wants_tokens(self, config: PromptConfig) -> bool:
        return isinstance(config, MEPTConfig) and config.decoder_sees_prompts is True

    def pools_rows(self, adapter: str) -> bool:
        config = self.prompt_config[adapter]
        return config.routing == "sample" and config.num_experts > 1

    def reads_query(self, adapter: str) -> bool:
        return self.site.by_token and self.pools_rows(adapter)

    def needs_call(self, adapter: str) -> bool:
        config = self.prompt_config[adapter]
        learns = self.training and config.num_experts > 1 and config.router_centering
        return self.reads_query(adapter) or learns

    def adds_losses(self, adapter: str) -> bool:
        return self._balances(self.prompt_config[adapter])

    def _balances(self, config: MEPTConfig) -> bool:
        return self.training and config.num_experts > 1 and config.balance_loss_weight > 0.0


def _of_all(x: Tensor, weights: list[float]) -> Chosen:
    """The record that every token of `x` (B, T, D) chooses all of several prompts, with fixed weights."""
    log_gates = torch.tensor(weights, device=x.device, dtype=torch.float32).log().expand(*x.shape[:2], -1)
    return Chosen(log_gates, torch.arange(len(weights), device=x.device).expand_as(log_gates), len(weights))


def shared_are_added(config: MEPTConfig) -> bool:
    """Whether shared rows are added to those of the chosen experts. They then start small (official code: zero).

    With shared rows of full size the sums are alike for all experts, and the router has little to choose between. On
    four tasks at once this cost 3 points of accuracy.
    """
    added = config.routing == "sample" and config.num_experts > 1 and config.num_shared_experts > 0
    return bool(config.init_weights and added)


def experts_to_start(config: MEPTConfig) -> int:
    """Number of experts that are initialised with layer inputs of vocabulary tokens."""
    return config.num_experts + (0 if shared_are_added(config) else config.num_shared_experts)


def random_rows(experts: int, slots: int, width: int, std: float) -> Tensor:
    """Normal random numbers (E, P, D) with standard deviation `std`. Left uninitialised while a file is loaded.

    The file's values replace them, and drawing the numbers would take longer than reading the file. A file that lacks
    any of them is refused.
    """
    rows = torch.empty(experts, slots, width)
    return rows if is_loading() else rows.normal_(std=std)


def orthogonal_rows(rows: int, width: int) -> Tensor:
    """Orthonormal rows (rows, width), the initialisation that the official code intends. In groups if rows > width."""
    weight = torch.empty(rows, width)
    for start in range(0, rows, width):
        nn.init.orthogonal_(weight[start : start + width])
    return weight
