# SPDX-License-Identifier: Apache-2.0
"""A site: one attention layer with its block, norm, positions and patch grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .causality import answers_by_row, is_causal
from .families import Family
from .inspection import calls_attention_interface, parameter_names, reads_into, unwrapped_forward
from .own_attention import OwnAttention
from .patches import Patches, find_patches
from .reachable import CannotJoin, check_reachable, check_timm, hands_on_its_mask_only, is_differential
from .surroundings import bias_owner, block_of, input_norm, input_std, rotary_embedding, rotary_type, sine_first
from .targets import (
    decoder_modules,
    family_of,
    input_width,
    is_cross_attention_layer,
    is_timm_attention,
)


@dataclass
class Site:
    """One attention layer that prompts can join, with what the engine needs of its surroundings.

    Attributes:
        name: path of the attention layer in the base model.
        index: number of the block, the first number in the path.
        attention: the attention layer.
        block: the transformer block that holds it.
        norm: module that makes the attention layer's input from the residual stream; None for post-norm blocks.
        family: the table's entry, None where only the generic rule reached this layer.
        width: width `D` of the layer input.
        causal: whether what the layer puts out for a token depends on earlier tokens only (`is_causal`).
        by_token: whether the layer is causal and the model's outputs are read token by token, so that a router which
            reads a whole row would let answers reach what is put out before them.
        is_rotary: whether the layer turns its keys by angles that it is given or makes of position ids.
        rotary: the model's rotary embedding, if it has one that can be asked, and
        rotary_type: the layer type it takes, for models that keep one table per type.
        sine_first: whether it gives (sin, cos), not (cos, sin).
        bias_owner: the module that holds the table of relative position biases this layer adds.
        input_std: spread of the block's input where it is knowable without running the model, else None.
        patches: of vision towers that have one patch grid, how it is made; else None.
        factor: what the block multiplies the norm's output by (Falcon-H1); None where it does not.
        calls: how many kernel calls the layer makes (two with differential attention).
        rows_by_mask: whether prompt rows travel with the attention mask, in layers that hand no other arguments on.
        reads_mask: whether the layer looks into its mask itself (DeepSeek's indexer), so that there must be one.
    """

    name: str
    index: int
    attention: Any
    block: Any
    norm: Any
    family: Family | None
    width: int
    causal: bool
    by_token: bool
    is_rotary: bool
    rotary: Any
    rotary_type: str | None
    sine_first: bool
    bias_owner: Any
    input_std: float | None
    patches: Patches | None = None
    factor: float | None = None
    calls: int = 1
    rows_by_mask: bool = False
    reads_mask: bool = False

    @property
    def own(self) -> OwnAttention | None:
        """How the layer computes attention itself; None where it calls a kernel."""
        return self.family.own if self.family is not None else None

    @property
    def is_called(self) -> bool:
        """Whether rows join within the layer's own forward, and not at transformers' AttentionInterface."""
        return self.own is not None or self.is_timm

    @property
    def is_timm(self) -> bool:
        """Whether the attention layer is timm's, which does not go through transformers' AttentionInterface."""
        return is_timm_attention(self.attention, self.name)


def find_site(model: nn.Module, path: str) -> Site:
    """Describe the attention layer at `path`.

    Raises:
        ValueError: the module at `path` is not an attention layer that the engine can reach, or the architecture is
            one where its output is known to differ from the definition; a `CannotJoin` where that is of this layer.
    """
    attention: Any = model.get_submodule(path)
    timm = is_timm_attention(attention, path)
    family = family_of(model, attention, path)
    own = family.own if family is not None else None
    if own is None and not timm and not calls_attention_interface(attention):
        raise ValueError(
            f"`target_modules` matched {path!r}, a {type(attention).__name__}, which is not an attention layer that "
            "calls transformers' AttentionInterface. Name the attention layers themselves (for example 'self_attn'), "
            "not their projections, or leave `target_modules` unset."
        )
    if is_cross_attention_layer(path, attention) or id(attention) in decoder_modules(model):
        raise ValueError(
            f"`target_modules` matched {path!r}. Prompts join self-attention, and of an encoder-decoder the encoder's "
            "only; its decoder sees them through what the encoder puts out. Name layers of the encoder, or leave "
            "`target_modules` unset."
        )
    if own is not None and (reason := own.why_not(attention)) is not None:
        raise CannotJoin(path, attention, reason)
    if timm:
        check_timm(attention, path)
    if getattr(attention, "reorder_and_upcast_attn", False):
        raise ValueError(
            f"{type(attention).__name__} with reorder_and_upcast_attn=True leaves out transformers' "
            "AttentionInterface, by which prompts join. Load the model with reorder_and_upcast_attn=False."
        )
    block_path, index = block_of(path)
    block = model.get_submodule(block_path or path.rpartition(".")[0])
    width = input_width(attention)
    patches = find_patches(model, path, width)
    rotary = rotary_embedding(model, path) if patches is None and not timm else None
    biases = bias_owner(model, path, attention, own.table if own is not None else None)
    if family is None and not timm:
        check_reachable(model, path, patches, rotary, biases)
    by_mask = family.rows_by_mask if family is not None else not timm and hands_on_its_mask_only(attention)
    kind, names = rotary_type(rotary, attention, block), () if timm else parameter_names(attention)
    # Beam turns in some kinds of layers only, and Falcon not where it has linear biases.
    if (kind is not None and not hasattr(rotary, f"{kind}_inv_freq")) or (own and not own.turns(attention)):
        rotary, kind, names = None, None, ()
    causal = not timm and patches is None and (own.causal(attention) if own is not None else is_causal(model, path))
    return Site(
        name=path,
        index=index,
        attention=attention,
        block=block,
        norm=input_norm(model, path, block_path, None if timm else family),
        family=family,
        width=width,
        causal=causal,
        by_token=causal and not answers_by_row(model, path),
        is_rotary="position_embeddings" in names or (rotary is not None and "position_ids" in names),
        rotary=rotary,
        rotary_type=kind,
        sine_first=sine_first(rotary),
        bias_owner=biases,
        input_std=input_std(model, path, index, family),
        patches=patches,
        factor=getattr(block, "attention_in_multiplier", None) if family is None else None,
        calls=2 if is_differential(attention) else 1,
        rows_by_mask=by_mask,
        reads_mask=not timm and own is None and reads_into(unwrapped_forward(attention), "attention_mask"),
    )


def caps_scores(attention: nn.Module) -> bool:
    """Whether an attention layer squashes its scores before the softmax (Gemma 2)."""
    return getattr(attention, "attn_logit_softcapping", None) is not None
