# SPDX-License-Identifier: Apache-2.0
"""The pMoE layer: prompts and dispatcher of one block of one expert."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapter_state import PromptTable, TensorGroup
from ..engine.token_layer import TokenLayer
from ..models.sites import Site
from ..routing.router import without_autocast
from .config import PMoEConfig
from .dispatch import all_tokens, dispatch_attention, dispatch_experts, dispatch_sum, dispatch_tokens, group_shares

OWN_SHARE = 0.9  # initial share of its own expert's prompts in a dispatcher's output


class OtherExperts(Protocol):
    """What a prompt layer needs from the other experts. Implemented by `PMoEShared`."""

    def number(self, adapter: str, expert: str | None) -> int:
        """Number of an expert within an adapter. The base model is number 0."""

    def find(self, expert: str | None, block: int) -> PMoELayer | None:
        """The prompt layer of an expert's block. None if the block has none."""

    def prompts(self, adapter: str, reader: PMoELayer, device: torch.device) -> list[Tensor]:
        """All experts' prompts at the same relative depth as the reader's block, K tensors (P, D) of its width."""


class PMoELayer(TokenLayer):
    """Prompts and dispatcher of one block of one expert, for any number of adapters.

    Trained tensors per adapter: `pmoe_prompts` (P, D) and those of `pmoe_dispatcher`: for "token" weight (P, D) and
    bias (P,); for "expert" hidden_weight (h, D), hidden_bias (h,), weight (K, h), bias (K,); for "attention" query,
    key, down (r, D) and up (D, r).

    Args:
        site: the block's attention layer.

    Attributes:
        expert: key of the expert that the block belongs to. None: the base model.
        last_shares: for each adapter, (B, K + 2) shares of the experts' prompts, the carried prompts and the patches
            in the last forward pass.
    """

    adapter_layer_names = ("pmoe_prompts", "pmoe_dispatcher")
    other_param_names = (*TokenLayer.other_param_names, "last_shares")
    method = "pMoE"
    unrouted = "has dispatchers and no routers; routing_report(model) shows them"

    pmoe_prompts: nn.ModuleDict
    pmoe_dispatcher: nn.ModuleDict

    def __init__(self, site: Site, expert: str | None = None) -> None:
        super().__init__(site)
        self.expert = expert
        self.last_shares: dict[str, Tensor] = {}
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())

    def update_layer(self, adapter: str, config: PMoEConfig) -> None:
        patches, width, count = self.patches, self.site.width, config.num_virtual_tokens
        self.prompt_config[adapter] = config
        fan = patches.embedding.in_channels * math.prod(patches.size) + width
        bound = math.sqrt(6.0 / fan) if config.init_weights else 1.0
        self.pmoe_prompts[adapter] = PromptTable(torch.empty(count, width).uniform_(-bound, bound))
        if tensors := self._dispatcher(adapter, config):
            self.pmoe_dispatcher[adapter] = TensorGroup(tensors)

    def _dispatcher(self, adapter: str, config: PMoEConfig) -> dict[str, Tensor]:
        width, count, rank = self.site.width, config.num_virtual_tokens, config.dispatcher_dim
        experts = len(config.experts) + 1
        spread = 0.02 if config.init_weights else 2.0 / math.sqrt(width)
        if config.dispatcher == "token":
            others = (experts + int(config.carry_prompts)) * count - 1 + self._usual_patches()
            bias = torch.full((count,), math.log(others * OWN_SHARE / (1.0 - OWN_SHARE)))
            return {"weight": spread * torch.randn(count, width), "bias": bias}
        if config.dispatcher == "expert":
            bias = torch.zeros(experts)
            number = 0 if self.expert is None else self._shared().number(adapter, self.expert)
            bias[number] = math.log((experts - 1) * OWN_SHARE / (1.0 - OWN_SHARE))
            hidden = nn.Linear(width, rank)
            return {
                "hidden_weight": hidden.weight.detach(),
                "hidden_bias": hidden.bias.detach(),
                "weight": spread * torch.randn(experts, rank),
                "bias": bias,
            }
        if config.dispatcher == "attention":
            rows = {name: torch.randn(rank, width) / math.sqrt(width) for name in ("query", "key", "down")}
            # Zero, as in LoRA: training starts from the expert's own prompts.
            return rows | {"up": torch.zeros(width, rank) if config.init_weights else torch.randn(width, rank)}
        return {}

    def _usual_patches(self) -> int:
        patches = self.patches
        rows, columns = patches.grid(patches.image_size or (224, 224))
        return rows * columns

    def _shared(self) -> OtherExperts:
        return self.shared[0]  # type: ignore[return-value]

    def wants_shared(self, adapter: str) -> bool:
        return True

    def takes_over(self, adapter: str) -> PMoELayer | None:
        before = self._shared().find(self.expert, self.site.index - 1)
        takes = self.prompt_config[adapter].carry_prompts and before is not None and adapter in before.prompt_config
        return before if takes else None

    def tokens(self, adapter: str, patches: Tensor, carried: Tensor | None) -> Tensor:
        config: PMoEConfig = self.prompt_config[adapter]
        with without_autocast(patches):
            prompts, shares = self._dispatch(adapter, config, patches, carried)
        self.last_shares[adapter] = shares.detach()
        return prompts

    def _dispatch(
        self, adapter: str, config: PMoEConfig, patches: Tensor, carried: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Prompts (B, P, D), and the shares of what they are made of (B, K + 2)."""
        shared, slots = self._shared(), config.num_virtual_tokens
        number = shared.number(adapter, self.expert)
        if config.dispatcher == "none":
            own = self.pmoe_prompts[adapter]()
            return dispatch_sum([own], carried, len(patches)), self._fixed(config, patches, [number])
        prompts = shared.prompts(adapter, self, patches.device)
        if config.dispatcher == "mean":
            everyone = list(range(len(prompts)))
            return dispatch_sum(prompts, carried, len(patches)), self._fixed(config, patches, everyone)
        dispatcher: Any = self.pmoe_dispatcher[adapter]
        tokens, held = all_tokens(prompts, carried, patches), dispatcher()
        if config.dispatcher == "expert":
            made, gates = dispatch_experts(tokens, prompts, carried, **held)
            return made, torch.cat([gates, torch.zeros_like(gates[:, :1]).expand(-1, 2)], dim=1)
        if config.dispatcher == "token":
            made, shares = dispatch_tokens(tokens, number * slots, **held)
        else:
            made, shares = dispatch_attention(tokens, prompts[number], carried, **held)
        return made, group_shares(shares.detach(), len(prompts), slots, carried is not None)

    def _fixed(self, config: PMoEConfig, patches: Tensor, experts: list[int]) -> Tensor:
        shares = patches.new_zeros(len(config.experts) + 3)
        shares[experts] = 1.0 / len(experts)
        return shares.expand(len(patches), -1)
