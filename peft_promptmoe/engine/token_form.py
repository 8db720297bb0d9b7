# SPDX-License-Identifier: Apache-2.0
"""Token form: the prompts of the last encoder block as real tokens, for the decoder that reads its output.

In an encoder-decoder the decoder attends to all outputs of the last encoder block. In this block the prompt rows are
prepended to the input and not removed from the output. The decoder's mask grows by the same number.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VirtualTokensConfig
from ..models.call_arguments import first_real, real_tokens
from ..models.inspection import parameter_names
from ..models.sites import Site
from ..models.targets import model_type
from .key_value import KeyValueLayer
from .positions import as_pair, bias_at, first_position, relative_bias, row_positions
from .prompt_layer import PROMPT_CALL, no_call


class TokenForm:
    """Hooks on the last encoder block and on the decoder stack of one encoder-decoder.

    Args:
        layer: the prompt layer of the last encoder block.
        decoder: the decoder stack.
    """

    def __init__(self, layer: KeyValueLayer, decoder: nn.Module) -> None:
        self.layer = layer
        self.site = layer.site
        self.decoder = decoder
        self._names = parameter_names(layer.site.block)

    def attach(self) -> None:
        """Add the hooks that make the layer's rows real tokens of its block, for adapters that need it."""
        handles = [
            self.site.block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
        ]
        self.layer.hold_token_form(handles)

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layer = self.layer
        working = layer.working_adapters()
        adapters = [name for name in working if layer.as_tokens(name)]
        if not adapters:
            return None
        if len(adapters) < len(working):
            raise ValueError(
                "The active adapters have different values of decoder_sees_prompts. Activate adapters with the same "
                "value."
            )
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        x, mask, call = bound["hidden_states"], bound.get("attention_mask"), bound.get(PROMPT_CALL) or layer.calls.call
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
        if as_pair(bound.get("position_embeddings"), self.site.sine_first) is not None:
            parts = [self._tables(layer.prompt_config[name], bound, first_real(real)) for name in adapters]
            bound["position_embeddings"] = extend_tables(parts, bound["position_embeddings"])
        # Positional arguments stay positional: re-entrant checkpointing gives gradients to these only.
        positional = tuple(bound.pop(name) for name in self._names[: len(args)])
        return positional, bound

    def _tables(self, config: VirtualTokensConfig, bound: dict[str, Any], first: Tensor | None) -> Any:
        """Rotary tables of an adapter's prompts, in the block's form."""
        device, count = bound["hidden_states"].device, config.num_virtual_tokens
        offsets = _positions(config, device) if config.prompt_positions == "prefix" else None
        positions = row_positions(self.site, first_position(self.site, bound, first), offsets)
        return positions.tables(positions.batch, count, self.site.sine_first)

    def _before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Extend the decoder's mask by the slots in front of the encoder's output."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        layer = self.layer
        working = [name for name in layer.working_adapters() if layer.as_tokens(name)]
        more = sum(layer.prompt_config[name].num_virtual_tokens for name in working)
        if states is None or mask is None or not more or states.shape[1] != mask.shape[-1] + more:
            return None
        return args, {**kwargs, "encoder_attention_mask": F.pad(mask, (more, 0), value=1)}


def _positions(config: VirtualTokensConfig, device: torch.device) -> Tensor:
    """Positions of an adapter's prompts relative to the first real token, (P,)."""
    before = torch.arange(-config.num_virtual_tokens, 0, device=device)
    return before if config.prompt_positions == "prefix" else torch.zeros_like(before)


# Names in audio models. Their decoders compute times from the number of frames, or build a mask from it.
SOUND = re.compile(r"audio|speech|input_features|input_values", re.IGNORECASE)


def why_decoder_cannot_see(model: Any, site: Site) -> str | None:
    """Why the decoder of an encoder-decoder cannot get prompts with the encoder's output. None if it can.

    Args:
        model: the encoder-decoder.
        site: the attention layer of an encoder block.
    """
    name = type(model).__name__
    parts = [child for child, _ in model.named_children()]
    words = [model_type(model) or "", getattr(model, "main_input_name", ""), *parts]
    if any(SOUND.search(word) for word in words):
        return f"the decoder of {name} computes times or masks from the length of the encoder's output"
    if getattr(model, "main_input_name", "input_ids") != "input_ids" and not model.can_generate():
        return f"the decoder of {name} reads places from the encoder's output, and prompts have no place"
    if site.bias_owner is not None and "position_bias" not in parameter_names(site.block):
        return f"{type(site.attention).__name__} computes relative positions itself, so prompts cannot get any"
    return None


def extend_both_ways(mask: Tensor | None, slots: int) -> Tensor | None:
    """Mask of a bidirectional block with `slots` prompt tokens in front. They see all text, and all tokens see them.

    Args:
        mask: (B, 1, T or 1, T) boolean or additive, or None.
    """
    if mask is None:
        return None
    value = True if mask.dtype == torch.bool else 0.0
    mask = F.pad(mask, (slots, 0), value=value)
    if mask.shape[2] == 1:
        return mask
    # A prompt sees what any token sees. With windowed attention that is the whole text.
    anyone = mask.amax(dim=2, keepdim=True) if mask.is_floating_point() else mask.any(dim=2, keepdim=True)
    return torch.cat([anyone.expand(-1, -1, slots, -1), mask], dim=2)


def extend_tables(parts: list[Any], text: Any) -> Any:
    """Rotary tables (b, T, r), a pair or complex, with those of the prompts (b, R, r) in front."""
    if isinstance(text, Tensor):
        batch = max(text.shape[0], *(part.shape[0] for part in parts))
        return torch.cat([part.expand(batch, -1, -1).to(text.dtype) for part in [*parts, text]], dim=1)
    return tuple(extend_tables([part[which] for part in parts], table) for which, table in enumerate(text))


def extend_bias(site: Site, bias: Tensor, slots: Tensor, first: Tensor | None) -> Tensor:
    """T5 bias of a block with prompt tokens in front.

    Args:
        site: the attention layer.
        bias: (1, heads, T, T) bias within the text.
        slots: (R,) positions of the prompts relative to the first real token.
        first: (B,) column of the first real token. None: column 0 for all samples.

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
