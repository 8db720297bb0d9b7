# SPDX-License-Identifier: Apache-2.0
"""Key/value form: prompt rows join one frozen attention layer as extra keys and values."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptConfig
from ..models.call_arguments import first_real, packs_texts
from ..models.inspection import parameter_names
from ..models.reachable import CannotJoin
from ..models.sites import Site
from ..routing.prompt_call import PromptCall
from ..routing.record import Chosen
from .checkpointed import may_run_again
from .columns import Columns, MaskWithRows, Overheard, merge_columns
from .given_query import look_for_query
from .kernels import find_kernel
from .kernels.dense import SDPA
from .kernels.kernel import Kernel
from .positions import first_position, row_positions, slot_offsets
from .projection import project_experts, project_rows
from .prompt_layer import PROMPT_CALL, PromptLayer, no_call
from .row_cache import cached_rows, note_keys
from .rows import Rows, columns_of, decoding_table, gated_columns, place
from .samples import Given, close_to_others, merge_choices, samples_by_adapter, spread_choice, spread_rows
from .timm_attention import close_forward, open_forward
from .transformers_attention import COLUMNS, config_view

NOTED_INPUT = "promptmoe_layer_input"  # used where a factor after the norm makes a new tensor, which loses the note
MASKS = ("attention_mask", "mask", "attn_mask")  # the last one in timm


class KeyValueLayer(PromptLayer):
    """Base of the layers whose prompts join attention as extra keys and values. A method computes the rows."""

    note_name = "_promptmoe_layer_input"  # the norm leaves its input here; without a norm, the block leaves itself

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.has_token_form = False  # whether there is a `TokenForm` for adapters that need it
        self.kept: dict[Any, Rows] | None = None  # rows stored by `cached_prompts`
        self._names = parameter_names(site.attention)
        self.notes_arrive = site.family is not None  # whether norm and block are known to leave notes

    # -- what a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def rows(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Tensor:
        """Compute the prompt rows, in the form of layer inputs.

        Args:
            adapter: name of the adapter.
            x: (B, T, D) layer input before the block's own norm.
            real: (B, T) which tokens are real. None: all.
            call: the base model's call. None if there is none.

        Returns:
            (B or 1, R, D), with R a multiple of the adapter's number of slots. Row r is slot r % slots.
        """

    def choice(self, adapter: str, x: Tensor, real: Tensor | None, call: PromptCall | None) -> Chosen | None:
        """Which experts every token chooses. Their rows come first in `rows`. None: all tokens see all rows."""
        return None

    def reads_input(self, adapter: str) -> bool:
        """Whether the rows depend on the values of the layer's input, not only on its shape."""
        return True

    def needs_input(self, adapter: str) -> bool:
        """Whether anything in the adapter depends on the values of the layer's input."""
        return self.reads_input(adapter) or self.has_router(adapter)

    # -- in and out of the model --------------------------------------------------------------------------------------

    def hook(self) -> list[Any]:
        """Hook the attention layer and its norm, and let prompt rows reach the attention kernel."""
        attention = self.site.attention
        if self.site.is_called:
            open_forward(self.site)
        else:
            attention.config = config_view(self.site)
        handles = [
            attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            attention.register_forward_hook(self._after_attention, with_kwargs=True),
        ]
        if self.site.norm is not None:
            handles.append(self.site.norm.register_forward_hook(self._after_norm, with_kwargs=True))
        if self.site.factor is not None:
            handles.append(self.site.block.register_forward_pre_hook(self._hand_on_block_input, with_kwargs=True))
        if self.site.family is None and self._takes_block_input():
            handles.append(self.site.block.register_forward_pre_hook(self._before_block, with_kwargs=True))
        return handles

    def unhook(self) -> None:
        super().unhook()
        self.has_token_form = False
        if self.site.is_called:
            close_forward(self.site.attention)
        else:
            self.site.attention.config = self.site.attention.config.real

    def hold_token_form(self, handles: list[Any]) -> None:
        """Store the hooks of the `TokenForm`, which makes this layer's rows real tokens of its block."""
        self.has_token_form = True
        self._handles += handles

    # -- which adapters work in which form ----------------------------------------------------------------------------

    def as_tokens(self, adapter: str) -> bool:
        """Whether the adapter's prompts are real tokens in this block instead of attention rows."""
        return self.has_token_form and self.wants_tokens(self.prompt_config[adapter])

    def wants_tokens(self, config: PromptConfig) -> bool:
        """Whether the config needs token form if the model's decoder reads this block's output."""
        return False

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _after_norm(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Attach the norm's input to its output, for the attention layer."""
        layer_input = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, Tensor) and output is not layer_input:
            self.notes.leave(output, layer_input, self.calls)

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the block's input, to detect a norm that the generic rule has overlooked."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            self.notes.leave(hidden, block, self.calls)

    def _hand_on_block_input(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass the block's input to the attention layer as a keyword argument."""
        return args, {**kwargs, NOTED_INPUT: args[0] if args else kwargs["hidden_states"]}

    def _before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = kwargs.get(PROMPT_CALL) or self.calls.call
        adapters = [name for name in self.adapters_of(call) if not self.as_tokens(name)]
        if not adapters:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != PROMPT_CALL}
        kernel = SDPA if self.site.is_called else find_kernel(attention.config.real._attn_implementation)  # type: ignore
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        kwargs.pop(NOTED_INPUT, None)
        x = self._input_for(adapters, bound[self._names[0]], bound.pop(NOTED_INPUT, None))
        for name in adapters:
            if call is None and self.needs_call(name):
                raise ValueError(no_call(attention))
        cached, past = cached_rows(self.site, bound, x.shape[1])
        if call is not None and not past and any(map(self.reads_query, adapters)):
            look_for_query(call, self.training)
        mask = next((bound[name] for name in MASKS if bound.get(name) is not None), None)
        if self.site.own is not None and mask is not None:
            mask = self.site.own.opens(mask)
        # A mask of images holds relative positions (BEiT). In a row of many texts it separates the texts.
        padded = not past and self.site.patches is None and not packs_texts(bound)
        real = kernel.real(mask, x.shape[1]) if padded else None
        whose: dict[str, Tensor] | None = None
        if call is not None and call.names is not None:
            whose = samples_by_adapter(call.names, x.shape[0], x.device)
        given = Given(x, real, bound, call)
        parts = [
            self._columns(name, given, cached, past, kernel, None if whose is None else whose[name])
            for name in adapters
        ]
        columns = merge_columns(parts)
        if whose is not None:
            columns.chosen = merge_choices(columns.chosen)
        columns.calls = self.site.calls
        return self.carry(args, kwargs, columns)

    def carry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], columns: Columns | Overheard
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The attention layer's arguments, with the columns added."""
        if not self.site.rows_by_mask:
            return args, {**kwargs, COLUMNS: columns}
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        return (), {**bound, "attention_mask": MaskWithRows(bound.get("attention_mask"), columns)}

    def _after_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.notes.forget()
        mask = kwargs.get("attention_mask")
        columns = mask.columns if isinstance(mask, MaskWithRows) else kwargs.get(COLUMNS)
        if isinstance(columns, Columns):
            columns.check_arrived(f"{type(attention).__name__} at {self.site.name!r}")
            note_keys(self.site, dict(zip(self._names, args, strict=False)) | kwargs)

    def _takes_block_input(self) -> bool:
        return self.site.norm is None or isinstance(self.site.norm, nn.Identity)

    def _input_for(self, adapters: list[str], hidden: Tensor, noted: Tensor | None) -> Tensor:
        """The layer's input, (B, T, D). If no adapter reads its values, any tensor of this shape."""
        note = self.notes.on(hidden) if noted is None else noted
        if note is None and self.notes_arrive and not any(map(self.needs_input, adapters)):
            return hidden
        return self.layer_input(hidden, noted)

    def layer_input(self, hidden: Tensor, noted: Tensor | None = None) -> Tensor:
        """The attention layer's input before the norm, (B, T, D). `noted` if the block has passed it."""
        again = may_run_again(self.site.block)  # what the block's hooks handed on is of the first run
        if noted is not None and not again:
            return noted
        if self._takes_block_input() and (self.site.family is not None or torch.compiler.is_compiling()):
            return hidden
        note = self.notes.on(hidden)
        if note is None and self.notes_arrive:
            known = again and self._takes_block_input()  # from the first run
            note = self.site.block if known else self.notes.beside(hidden, self.calls)
        if self._takes_block_input():
            if note is self.site.block:
                return hidden
            reason = "its input is not its block's input, and no norm was found between the two"
        elif isinstance(note, Tensor) and note.shape == hidden.shape:
            return note
        else:
            reason = f"its input is not the output of {type(self.site.norm).__name__}, through which prompts pass"
        raise CannotJoin(self.site.name, self.site.attention, reason)

    def _columns(
        self,
        adapter: str,
        given: Given,
        cached: dict[str, Rows] | None,
        past: bool,
        kernel: Kernel,
        samples: Tensor | None,
    ) -> Columns:
        """The columns of one adapter. If it has only some samples, the columns are hidden from the others."""
        config, x, real = self.prompt_config[adapter], given.x, given.real
        own = given if samples is None else given.of(samples)
        before = self.last_routing.get(adapter, []) if past else []
        choice, first = self.choice(adapter, own.x, own.real, own.call), first_real(real)
        if choice is not None and before and not torch.compiler.is_compiling():
            self.note_step(adapter, before)
        if past:
            if cached is None or adapter not in cached:
                raise ValueError(
                    f"The cache holds tokens but no prompt rows of adapter {adapter!r}: it was filled while the "
                    "adapter was off, by another model, or by code that copies caches. Start from a new cache."
                )
            rows = cached[adapter]
        else:
            rows = self._project(adapter, own, 0 if choice is None else choice.of)
            if samples is not None:
                rows = spread_rows(rows, samples, x.shape[0])
            if self.site.own is not None:
                rows = replace(rows, first=first)  # a copy, because stored rows are also used for other texts
            if cached is not None:
                cached[adapter] = rows
                # Used for decoding only, which has no gradients.
                decodes = kernel.adds_mask and self.site.own is None and not torch.is_grad_enabled()
                if rows.experts is not None and decodes:
                    rows.experts.table = decoding_table(rows.experts)
        if samples is not None:
            choice = spread_choice(choice, samples, x.shape[0])
        if self.site.own is not None:
            columns, first = gated_columns(rows, choice), rows.first
        else:
            columns = columns_of(rows, choice, kernel.adds_mask)
        place(columns, self.site, config, first, x.shape[1])
        if samples is not None:
            close_to_others(columns, samples, x.shape[0], x.shape[1])
        return columns

    def _project(self, adapter: str, given: Given, experts: int) -> Rows:
        """The adapter's key and value rows. Stored ones are used if they are still valid."""
        config, (x, real, bound, call) = self.prompt_config[adapter], given
        turned = self.site.is_rotary and self.site.patches is None  # by angles that every call passes in
        anew = turned or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        kept = None if anew or self.reads_input(adapter) else self.kept
        # Only where rows are stored: the meta device has no autocast.
        key = None if kept is None else (adapter, x.device, x.dtype, torch.is_autocast_enabled(x.device.type))
        if kept is not None and key in kept:
            return kept[key]
        rows = self.rows(adapter, x, real, call).to(x.dtype)
        slots, prefix = config.num_virtual_tokens, config.prompt_positions == "prefix"
        at = first_position(self.site, bound, first_real(real))
        if experts:
            found = project_experts(self.site, rows, slots, experts * slots, at, prefix)
        else:
            offsets = slot_offsets(rows.shape[1], slots, x.device) if prefix else None
            found = project_rows(self.site, rows, row_positions(self.site, at, offsets))
        if kept is not None:
            kept[key] = found
        return found
