# SPDX-License-Identifier: Apache-2.0
"""Key/value form: prompt rows join one frozen attention layer as further keys and values."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptConfig
from ..models.call_arguments import first_real
from ..models.inspection import parameter_names
from ..models.query import refuse_unknown_query, warn_of_whole_rows
from ..models.sites import Site
from ..routing.prompt_call import PromptCall
from ..routing.record import Chosen
from .columns import Columns, MaskWithRows, merge_columns
from .kernels import find_kernel
from .kernels.dense import SDPA
from .kernels.kernel import Kernel
from .projection import (
    first_angle,
    project_experts,
    project_rows,
    relative_bias,
    rotary_tables,
    slot_offsets,
)
from .prompt_layer import PROMPT_CALL, PromptLayer
from .row_cache import cached_rows, note_keys
from .rows import Rows, columns_of, decoding_table
from .timm_attention import close_forward, open_forward
from .transformers_attention import COLUMNS, ConfigView

LAYER_INPUT = "_promptmoe_layer_input"
BLOCK_INPUT = "_promptmoe_block_input"


class KeyValueLayer(PromptLayer):
    """Prompts that join attention as further keys and values; a method says how its rows come about."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.has_token_form = False  # whether a `TokenForm` stands by for adapters that ask for it
        self.kept: dict[Any, Rows] | None = None  # rows that `cached_prompts` makes once
        self._names = parameter_names(site.attention)

    # -- what a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def rows(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Tensor:
        """Prompt rows in the place of layer inputs.

        Args:
            x: (B, T, D) layer input before the block's own norm.
            real: (B, T) which tokens are real; None for all.
            call: what the base model's forward tells its layers; None if it has nothing to tell.

        Returns:
            (B or 1, R, D), R a multiple of the adapter's number of slots; row r is slot r % slots.
        """

    def choice(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Chosen | None:
        """Which experts every token chooses; their rows are the first of `rows`. None if all rows are open to all."""
        return None

    def reads_input(self, adapter: str) -> bool:
        """Whether the rows depend on the layer's input."""
        return True

    # -- in and out of the model --------------------------------------------------------------------------------------

    def hook(self) -> list[Any]:
        """Hook the attention layer and its norm, and open the layer's way to the kernel for prompt rows."""
        attention = self.site.attention
        if self.site.is_timm:
            open_forward(attention)
        else:
            attention.config = ConfigView(attention.config)
        handles = [
            attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            attention.register_forward_hook(self._after_attention, with_kwargs=True),
        ]
        if self.site.norm is not None:
            handles.append(self.site.norm.register_forward_hook(self._after_norm, with_kwargs=True))
        if self.site.family is None:
            handles.append(self.site.block.register_forward_pre_hook(self._before_block, with_kwargs=True))
        return handles

    def unhook(self) -> None:
        super().unhook()
        self.has_token_form = False
        if self.site.is_timm:
            close_forward(self.site.attention)
        else:
            self.site.attention.config = self.site.attention.config.real

    def hold_token_form(self, handles: list[Any]) -> None:
        """Keep the hooks by which this layer's rows are real tokens of its whole block where adapters ask for it."""
        self.has_token_form = True
        self._handles += handles

    # -- which adapters work in which form ----------------------------------------------------------------------------

    def as_tokens(self, adapter: str) -> bool:
        """Whether the adapter's prompts are real tokens in this block rather than rows of its attention."""
        return self.has_token_form and self.wants_tokens(self.prompt_config[adapter])

    def wants_tokens(self, config: PromptConfig) -> bool:
        """Whether the config asks for token form where the model's decoder reads this block's output."""
        return False

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _after_norm(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Let the norm's output carry its input to the attention layer.

        A note on the tensor itself cannot be picked up by another thread or another call, unlike one on a module.
        """
        layer_input = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, Tensor) and output is not layer_input:
            setattr(output, LAYER_INPUT, layer_input)

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the block's input, so that a wrong guess of the generic rule about norms cannot go unnoticed."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            setattr(hidden, BLOCK_INPUT, id(block))

    def _before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        adapters = [name for name in self.working_adapters() if not self.as_tokens(name)]
        if not adapters:
            return None
        kwargs = dict(kwargs)
        call = kwargs.pop(PROMPT_CALL, None) or self.calls.call
        kernel = SDPA if self.site.is_timm else find_kernel(attention.config.real._attn_implementation)  # type: ignore
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        x = self.layer_input(bound[self._names[0]])
        for name in adapters:
            if call is None and self.needs_call(name):
                raise ValueError(no_call(attention))
        cached, past = cached_rows(self.site, bound, x.shape[1])
        if call is not None and not past and any(map(self.reads_query, adapters)):
            self._look_for_query(call)
        mask = bound.get("attention_mask", bound.get("mask"))
        # Images have no padding; what BEiT passes as a mask are its relative positions.
        real = kernel.real(mask, x.shape[1]) if not past and self.site.patches is None else None
        parts = [self._columns(name, x, real, bound, call, cached, past, kernel) for name in adapters]
        columns = merge_columns(parts)
        if self.site.family is not None and self.site.family.rows_by_mask:
            return (), {**bound, "attention_mask": MaskWithRows(bound.get("attention_mask"), columns)}
        kwargs[COLUMNS] = columns
        return args, kwargs

    def _look_for_query(self, call: PromptCall) -> None:
        """Refuse, or say, that a router will read a text with its answer."""
        if call.knows_query:
            return
        if self.training and call.learns:
            refuse_unknown_query()
        if not (call.cached or call.warned or torch.compiler.is_compiling()):
            call.warned = True
            warn_of_whole_rows()

    def _after_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        mask = kwargs.get("attention_mask")
        columns = mask.columns if isinstance(mask, MaskWithRows) else kwargs.get(COLUMNS)
        if isinstance(columns, Columns) and columns.arrived != 1:
            raise RuntimeError(
                f"{type(attention).__name__} at {self.site.name!r} reached its attention kernel "
                f"{columns.arrived} times in one call instead of once, so the prompts did not join its attention as "
                "defined. This architecture (or this option of it) is not supported; unload the adapter."
            )
        if isinstance(columns, Columns):
            note_keys(self.site, dict(zip(self._names, args, strict=False)) | kwargs)

    def layer_input(self, hidden: Tensor) -> Tensor:
        layer_input: Tensor | None = hidden
        if self.site.norm is not None and not isinstance(self.site.norm, nn.Identity):
            layer_input = getattr(hidden, LAYER_INPUT, None)
            if layer_input is None:
                raise RuntimeError(
                    f"The input of {self.site.name!r} is not the output of {type(self.site.norm).__name__}, so the "
                    "router cannot see the layer's input. This architecture is not supported."
                )
        check = self.site.family is None and not torch.compiler.is_compiling()
        if check and getattr(layer_input, BLOCK_INPUT, None) != id(self.site.block):
            raise RuntimeError(
                f"More than one norm stands between the input of {type(self.site.block).__name__} and "
                f"{self.site.name!r}, so prompts would not pass through what the text passes through. This "
                "architecture is not supported."
            )
        assert layer_input is not None
        return layer_input

    def _columns(
        self,
        adapter: str,
        x: Tensor,
        real: Tensor | None,
        bound: dict[str, Any],
        call: PromptCall | None,
        cached: dict[str, Rows] | None,
        past: bool,
        kernel: Kernel,
    ) -> Columns:
        config = self.prompt_config[adapter]
        choice, first = self.choice(adapter, x, real, call), first_real(real)
        if past:
            if cached is None or adapter not in cached:
                raise ValueError(
                    f"The cache holds tokens but no prompt rows of adapter {adapter!r}: it was filled while the "
                    "adapter was off, by another model, or by code that copies caches. Start from a new cache."
                )
            rows = cached[adapter]
        else:
            rows = self._project(adapter, x, real, bound, call, 0 if choice is None else choice.of)
            if cached is not None:
                cached[adapter] = rows
                # Gathered from while decoding, and there without gradient only.
                if rows.experts is not None and kernel.adds_mask and not torch.is_grad_enabled():
                    rows.experts.table = decoding_table(rows.experts)
        columns = columns_of(rows, choice, kernel.adds_mask)
        if self.site.bias_owner is not None:
            offsets = slot_offsets(config.num_virtual_tokens, config.num_virtual_tokens, x.device)
            offsets = offsets if config.prompt_positions == "prefix" else offsets * 0
            bias = relative_bias(self.site, first, offsets, x.shape[1])
            assert bias is not None
            columns.bias = bias.repeat(1, 1, 1, columns.rows // config.num_virtual_tokens)
            for chosen in columns.chosen:
                chosen.bias = bias
        return columns

    def _project(
        self,
        adapter: str,
        x: Tensor,
        real: Tensor | None,
        bound: dict[str, Any],
        call: PromptCall | None,
        experts: int,
    ) -> Rows:
        """The adapter's key and value rows, or those kept from the last time where they would be the same."""
        config, positions = self.prompt_config[adapter], bound.get("position_embeddings")
        turned = positions is not None and self.site.patches is None  # by angles that each call brings along
        anew = turned or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        kept = None if anew or self.reads_input(adapter) else self.kept
        # Asked only where rows are kept: of the meta device there is no autocast to ask for.
        key = None if kept is None else (adapter, x.device, x.dtype, torch.is_autocast_enabled(x.device.type))
        if kept is not None and key in kept:
            return kept[key]
        rows = self.rows(adapter, x, real, call).to(x.dtype)
        slots, prefix = config.num_virtual_tokens, config.prompt_positions == "prefix"
        angle = first_angle(self.site, positions, first_real(real))
        if experts:
            found = project_experts(self.site, rows, slots, experts * slots, angle, prefix, bound)
        else:
            offsets = slot_offsets(rows.shape[1], slots, x.device) if prefix else None
            found = project_rows(self.site, rows, rotary_tables(self.site, angle, offsets), bound)
        if kept is not None:
            kept[key] = found
        return found


def no_call(attention: nn.Module) -> str:
    return (
        f"{type(attention).__name__} was called outside a forward of the model that holds its block, or is run again "
        "by checkpointing in a model that does not pass keyword arguments on. So its prompt layer cannot learn which "
        "tokens belong to the query or keep a router's centre. Call the model or its encoder and not its blocks, do "
        "not checkpoint, or use routing='token' (causal models) and router_centering=False."
    )
