# SPDX-License-Identifier: Apache-2.0
"""Token form: prompts as real tokens through a whole block, for blocks whose prompt outputs somebody reads.

In an encoder-decoder the decoder attends to everything the last encoder block puts out. There the prompt rows are
prepended to the block's input and nothing is dropped behind it; the decoder's mask grows by the same number.

In a vision transformer whose next block's prompts are made from what this block makes of its own (`TokenLayer`), they
stand behind the prefix tokens and are taken out behind the block, so that the model sees no more tokens than before.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PromptConfig
from .inspection import parameter_names
from .key_value import KeyValueLayer, no_call
from .layer import CALL, PromptLayer
from .projection import bias_at, first_real, real_tokens, relative_bias
from .sites import Site
from .vision import Patches

CARRIED = "_promptmoe_carried"


class TokenLayer(PromptLayer):
    """Prompts that pass through the whole block of a vision transformer as real tokens behind its prefix tokens."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._names = parameter_names(site.block)

    @abstractmethod
    def tokens(self, adapter: str, patches: Tensor, carried: Tensor | None) -> Tensor:
        """Prompt tokens of the block's input.

        Args:
            patches: (B, N, D) the block's input at the patches.
            carried: (B, P, D) what the block before has made of its prompts; None if it had none or they are dropped.

        Returns:
            (B, P, D).
        """

    @abstractmethod
    def takes_over(self, adapter: str) -> bool:
        """Whether the prompts that come out of the block before are read here."""

    def hook(self) -> list[Any]:
        block = self.site.block
        return [
            block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            # Before all others: those that transformers captures hidden states by see tokens without prompts.
            block.register_forward_hook(self._after_block, prepend=True),
        ]

    def working_adapter(self) -> str | None:
        """The active adapter that has prompts here.

        Raises:
            ValueError: there are several.
        """
        working = self.working_adapters()
        if len(working) > 1:
            raise ValueError(
                f"{self.method} works with one active adapter at a time, and {working} are active. Activate one with "
                "set_adapter()."
            )
        return working[0] if working else None

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        adapter = self.working_adapter()
        if adapter is None:
            return None
        x = args[0] if args else kwargs[self._names[0]]
        carried = None
        if self.takes_over(adapter):
            # A note on the tensor itself: another thread or another call cannot pick it up, unlike one on a module.
            carried = getattr(x, CARRIED, None)
            if carried is None:
                raise RuntimeError(
                    f"The input of {self.site.name!r} is not what the block before it put out, so its prompts cannot "
                    "be carried on. If the model checkpoints activations, do so with use_reentrant=False; if FSDP "
                    "shards it, train with DDP; otherwise set carry_prompts=False."
                )
        patches = self._patches()
        prompts = self.tokens(adapter, x[:, patches.prefix :], carried).to(x.dtype)
        x = torch.cat([x[:, : patches.prefix], prompts, x[:, patches.prefix :]], dim=1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self._names[0]: x})

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        adapter = self.working_adapter()
        if adapter is None:
            return None
        x = output[0] if isinstance(output, tuple) else output
        start = self._patches().prefix
        stop = start + self.prompt_config[adapter].num_virtual_tokens
        kept = torch.cat([x[:, :start], x[:, stop:]], dim=1)
        setattr(kept, CARRIED, x[:, start:stop])
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    def _patches(self) -> Patches:
        assert self.site.patches is not None
        return self.site.patches


class TokenForm:
    """Hooks on the last encoder block and on the decoder stack of one encoder-decoder.

    Args:
        site: the attention layer of the last encoder block.
        decoder: the decoder stack.
    """

    def __init__(self, site: Site, decoder: nn.Module) -> None:
        self.site = site
        self.decoder = decoder
        self.layer: KeyValueLayer | None = None
        self._names = parameter_names(site.block)
        self._handles: list[Any] = []

    def attach(self, layer: KeyValueLayer) -> None:
        self.layer = layer
        self._handles = [
            self.site.block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layer = self.layer
        assert layer is not None
        working = layer.working_adapters()
        adapters = [name for name in working if layer.as_tokens(name)]
        if not adapters:
            return None
        if len(adapters) < len(working):
            raise ValueError(
                "Of the active adapters some have decoder_sees_prompts=True and some False; activate adapters that "
                "agree."
            )
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        x, mask, call = bound["hidden_states"], bound.get("attention_mask"), bound.get(CALL)
        real = real_tokens(mask, x.shape[1])
        rows = []
        for name in adapters:
            if call is None and layer.needs_call(name):
                raise ValueError(no_call(block))
            rows.append(layer.rows(name, x, real, call).to(x.dtype).expand(x.shape[0], -1, -1))
        prompts = torch.cat(rows, dim=1)
        bound["hidden_states"] = torch.cat([prompts, x], dim=1)
        bound["attention_mask"] = extend_both_ways(mask, prompts.shape[1])
        if self.site.bias_owner is not None:
            slots = torch.cat([_positions(layer.prompt_config[name], x.device) for name in adapters])
            bias = bound.get("position_bias")
            if bias is None:
                bias = self.site.bias_owner.compute_bias(x.shape[1], x.shape[1], device=x.device)
            bound["position_bias"] = extend_bias(self.site, bias, slots, first_real(real))
        # What came by position goes on by position: re-entrant checkpointing gives gradients to nothing else.
        positional = tuple(bound.pop(name) for name in self._names[: len(args)])
        return positional, bound

    def _before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Open the decoder's mask for the slots that stand in front of the encoder's output."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        layer = self.layer
        assert layer is not None
        working = [name for name in layer.working_adapters() if layer.as_tokens(name)]
        more = sum(layer.prompt_config[name].num_virtual_tokens for name in working)
        if states is None or mask is None or not more or states.shape[1] != mask.shape[-1] + more:
            return None
        return args, {**kwargs, "encoder_attention_mask": F.pad(mask, (more, 0), value=1)}


def _positions(config: PromptConfig, device: torch.device) -> Tensor:
    """(P,) positions of an adapter's prompts relative to the first real token."""
    before = torch.arange(-config.num_virtual_tokens, 0, device=device)
    return before if config.prompt_positions == "prefix" else torch.zeros_like(before)


def takes_bias(site: Site) -> bool:
    """Whether relative positions, if the layer has any, can be given to its block from outside (T5, not UMT5)."""
    return site.bias_owner is None or "position_bias" in parameter_names(site.block)


def extend_both_ways(mask: Tensor | None, slots: int) -> Tensor | None:
    """Mask of a bidirectional block with `slots` prompt tokens in front, which everyone sees and which see all text.

    Args:
        mask: (B, 1, T or 1, T) boolean or additive, or None.
    """
    if mask is None:
        return None
    value = True if mask.dtype == torch.bool else 0.0
    mask = F.pad(mask, (slots, 0), value=value)
    if mask.shape[2] == 1:
        return mask
    # Without causality every query has the same mask, so any row will do for the prompts'.
    return torch.cat([mask[:, :, -1:].expand(-1, -1, slots, -1), mask], dim=2)


def extend_bias(site: Site, bias: Tensor, slots: Tensor, first: Tensor | None) -> Tensor:
    """T5 bias of a block with prompt tokens in front.

    Args:
        bias: (1, heads, T, T) among the text.
        slots: (R,) positions of the prompts relative to the first real token.
        first: (B,) column of the first real token; None for column 0 of all.

    Returns:
        (B or 1, heads, R + T, R + T).
    """
    owner = site.bias_owner
    assert owner is not None
    length = bias.shape[-1]
    to_prompts = relative_bias(site, first, slots, length)  # (b, heads, T, R)
    assert to_prompts is not None
    batch = to_prompts.shape[0]
    start = first if first is not None else torch.zeros(1, dtype=torch.long, device=slots.device)
    text = torch.arange(length, device=slots.device)[None] - start[:, None]  # (b, T)
    memory = torch.cat([slots.expand(batch, -1), text], dim=1)
    from_prompts = bias_at(owner, memory[:, None, :] - slots[None, :, None])
    from_text = torch.cat([to_prompts, bias.expand(batch, -1, -1, -1)], dim=-1)
    return torch.cat([from_prompts, from_text], dim=2)
