# SPDX-License-Identifier: Apache-2.0
"""What the experts share: the further backbones, linear maps between widths, and the head on their features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter_state import PromptTable, SharedLayer, put_away
from ..models.patches import Patches
from ..reports.dispatch_report import DispatchReport
from .config import PMoEConfig
from .experts.gather import Expert
from .experts.records import ExpertRecord
from .layer import PMoELayer


class HooksOnBase(Protocol):
    """Hooks that add the experts' features to the base model. Implemented by `Fusion`."""

    def open(self) -> None:
        """Add the hooks."""

    def shut(self) -> None:
        """Remove the hooks."""


class Bridges(nn.Module):
    """Linear maps of prompts between experts of different widths: `weight_j_to_k` (D_k, D_j)."""

    def __init__(self, widths: Sequence[int], init_weights: bool) -> None:
        super().__init__()
        for j, given in enumerate(widths):
            for k, taken in enumerate(widths):
                if given != taken:
                    weight = torch.randn(taken, given) / math.sqrt(given)
                    self.register_parameter(f"weight_{j}_to_{k}", nn.Parameter(weight))

    def forward(self, prompts: Tensor, j: int, k: int) -> Tensor:
        weight = getattr(self, f"weight_{j}_to_{k}", None)
        if weight is None:
            return prompts
        dtype = torch.promote_types(prompts.dtype, weight.dtype)
        return F.linear(prompts.to(dtype), weight.to(device=prompts.device, dtype=dtype))


class PMoEShared(SharedLayer):
    """The further experts with their prompt layers, bridges and fusion weights, for any number of adapters.

    The experts' own weights are frozen and not part of the model's parameters or state dict. They are moved and cast
    with the model and stay in evaluation mode; they are not saved, loaded or trained. Trained tensors per adapter:
    `pmoe_fusion` (C, sum of the further experts' D_k), `pmoe_bridges`, and the layers of the further experts' blocks.

    Attributes:
        experts: the further experts, by key.
        members: for each adapter, the keys of its further experts in order.
        records: for each adapter, the records of its experts. Adapters may use an expert with different pixels.
        last_decision: for each adapter, (B, K) terms of the experts in the logit of the predicted class, if the last
            forward pass was in evaluation mode.
        layers: the further experts' prompt layers, by key and block.
        fusion: hooks that add the features to the base model. Set by the tuner.
    """

    adapter_layer_names: tuple[str, ...] = ("pmoe_fusion", "pmoe_bridges")
    other_param_names: tuple[str, ...] = ("prompt_config", "members", "records", "last_decision")

    pmoe_fusion: nn.ModuleDict
    pmoe_bridges: nn.ModuleDict

    def __init__(self, anchor: nn.Module, width: int) -> None:
        super().__init__(anchor, width)
        self.experts: dict[str, Expert] = {}
        self.members: dict[str, list[str]] = {}
        self.records: dict[str, list[ExpertRecord]] = {}
        self.last_decision: dict[str, Tensor] = {}
        self.layers = nn.ModuleDict()
        self.depth = 0
        self._base_layers: dict[int, PMoELayer] = {}
        self._base: tuple[nn.Module, str | None] | None = None
        self._coming: list[Expert] = []
        self.fusion: HooksOnBase | None = None
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())

    # -- adapters come and go -----------------------------------------------------------------------------------------

    def welcome(self, model: nn.Module, head: str | None, depth: int, experts: list[Expert]) -> None:
        """Store the further experts of the next adapter, and the base model's classifier and depth."""
        self._base, self.depth, self._coming = (model, head), depth, experts

    def join(self, layer: Any) -> None:
        self._base_layers[layer.site.index] = layer

    def update_layer(self, adapter: str, config: PMoEConfig) -> None:
        assert self._base is not None
        self.prompt_config[adapter] = config
        self.members[adapter] = [expert.key for expert in self._coming]
        self.records[adapter] = [expert.record for expert in self._coming]
        for expert in self._coming:
            self.experts.setdefault(expert.key, expert)
            if expert.key not in self.layers:
                self.layers[expert.key] = nn.ModuleDict()
            for site in expert.sites:
                if config.layers_to_transform is None or site.index in prompted_blocks(config):
                    self._prompt(expert.key, site.index, adapter, config)
        widths = [self.width, *(expert.record.width for expert in self._coming)]
        if len(set(widths)) > 1 and config.dispatcher != "none":
            self.pmoe_bridges[adapter] = Bridges(widths, config.init_weights)
        model, head = self._base
        if head is not None and self._coming and config.fusion != "mean":
            classes = classifier(model, head).out_features
            weight = torch.zeros(classes, sum(widths[1:]))
            self.pmoe_fusion[adapter] = PromptTable(weight if config.init_weights else 0.1 * torch.randn_like(weight))

    def _prompt(self, key: str, block: int, adapter: str, config: PMoEConfig) -> None:
        blocks: Any = self.layers[key]
        if str(block) not in blocks:
            blocks[str(block)] = layer = PMoELayer(self.experts[key].sites[block], key)
            layer.shared = (self,)
            layer._handles = layer.hook()
        blocks[str(block)].update_layer(adapter, config)
        blocks[str(block)]._move_adapter_to_device_of_base_layer(adapter)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PMoEShared:
        """Move and cast the experts together with the model."""
        super()._apply(fn, recurse)
        for expert in self.experts.values():
            expert.module._apply(fn)
        return self

    # -- who reads whose prompts --------------------------------------------------------------------------------------

    def find(self, expert: str | None, block: int) -> PMoELayer | None:
        """The prompt layer of an expert's block. None if the block has none."""
        if expert is None:
            return self._base_layers.get(block)
        blocks: Any = self.layers[expert]
        name = str(block)
        return blocks[name] if name in blocks else None  # noqa: SIM401  a ModuleDict has no get

    def layers_of(self, expert: str | None, adapter: str) -> list[PMoELayer]:
        """The layers of an expert with prompts of an adapter, in the order of the blocks."""
        blocks: Any = self._base_layers if expert is None else self.layers[expert]
        return [layer for _, layer in sorted(blocks.items(), key=_number) if adapter in layer.prompt_config]

    def report(self, adapter: str) -> DispatchReport:
        """Report on the last forward pass.

        Raises:
            ValueError: no forward pass was run with this adapter.
        """
        names, blocks, shares = ["base model", *(record.name for record in self.records[adapter])], [], []
        images = 0
        for number, key in enumerate([None, *self.members[adapter]]):
            for layer in self.layers_of(key, adapter):
                if adapter in layer.last_shares:
                    images = len(layer.last_shares[adapter])
                    blocks.append((number, layer.site.index))
                    shares.append(layer.last_shares[adapter].float().mean(dim=0).cpu())
        if not shares:
            raise ValueError("No forward pass was dispatched yet. Run the model once before asking for a report.")
        terms = self.last_decision.get(adapter)
        decision = decided = None
        if terms is not None:
            decision = terms.float().mean(dim=0).cpu()
            decided = torch.bincount(terms.argmax(dim=1).cpu(), minlength=len(names)) / len(terms)
        return DispatchReport(names, blocks, torch.stack(shares), decision, decided, images)

    def number(self, adapter: str, expert: str | None) -> int:
        """Number of an expert within an adapter. The base model is number 0."""
        return 0 if expert is None else self.members[adapter].index(expert) + 1

    def prompts(self, adapter: str, reader: PMoELayer, device: torch.device) -> list[Tensor]:
        """All experts' prompts at the same relative depth as the reader's block, K tensors (P, D) of its width."""
        found = []
        keys = [None, *self.members[adapter]]
        own = self.number(adapter, reader.expert)
        for number, key in enumerate(keys):
            block = aligned_block(reader.site.index, self._depth(reader.expert), self._depth(key))
            layer = self.find(key, block)
            assert layer is not None
            prompts = layer.pmoe_prompts[adapter]()
            if put_away(prompts):
                raise RuntimeError(
                    "pMoE reads the prompts of all experts in front of every block, but FSDP keeps those of "
                    f"{layer.site.name!r} in memory only while that block runs. Train with DDP."
                )
            prompts = prompts.to(device)
            if adapter in self.pmoe_bridges:
                prompts = self.pmoe_bridges[adapter](prompts, number, own)
            found.append(prompts)
        return found

    def _depth(self, expert: str | None) -> int:
        return self.depth if expert is None else len(self.experts[expert].sites)

    # -- what fusion and reports ask for ------------------------------------------------------------------------------

    def base(self) -> tuple[nn.Module, str | None]:
        """The base model, and the path of its classifier."""
        assert self._base is not None
        return self._base

    def patches(self, expert: str | None) -> Patches:
        """The patch embedding of an expert."""
        layer = next(iter(self._base_layers.values())) if expert is None else None
        site = layer.site if layer is not None else self.experts[str(expert)].sites[0]
        assert site.patches is not None
        return site.patches

    def close(self) -> None:
        if self.fusion is not None:
            self.fusion.shut()


def _number(item: tuple[Any, Any]) -> int:
    return int(item[0])


def aligned_block(block: int, depth: int, other: int) -> int:
    """The block at the same relative depth in an expert with `other` blocks."""
    return (2 * block + 1) * other // (2 * depth)


def prompted_blocks(config: PMoEConfig) -> set[int]:
    asked = config.layers_to_transform
    assert asked is not None
    return {asked} if isinstance(asked, int) else set(asked)


def classifier(model: nn.Module, head: str) -> nn.Linear:
    """The classifier at a path, without PEFT's `modules_to_save` wrapper."""
    module: Any = model.get_submodule(head)
    return getattr(module, "original_module", module)


def shared_of(model: nn.Module) -> PMoEShared:
    """The shared state of a model's experts.

    Raises:
        ValueError: the model has no pMoE adapter.
    """
    for module in model.modules():
        if isinstance(module, PMoEShared):
            return module
    raise ValueError(f"{type(model).__name__} has no pMoE adapter. Add one with get_peft_model().")
