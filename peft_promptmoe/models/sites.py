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
from .surroundings import (
    bias_owner,
    block_of,
    input_norm,
    input_std,
    rotary_embedding,
    rotary_type,
    sine_first,
    stage_of,
)
from .targets import (
    decoder_modules,
    family_of,
    input_width,
    is_cross_attention_layer,
    is_timm_attention,
    output_width,
)


@dataclass
class Site:
    """One attention layer that prompts can join, with what the engine needs of its surroundings.

    Attributes:
        name: path of the attention layer in the base model.
        index: number of the block, the first number in the path. Blocks in stages (Swin) are counted over all stages.
        attention: the attention layer.
        block: the transformer block that holds it.
        norm: norm between the residual stream and the attention layer. None for post-norm blocks.
        family: entry of the table of tested architectures. None if the layer was found by the generic rule.
        width: width `D` of the layer's input.
        causal: whether the layer's output for a token depends on earlier tokens only (`is_causal`).
        by_token: whether the layer is causal and the model's output is read token by token. A router that reads a
            whole row would then leak answers into outputs before them.
        is_rotary: whether the layer applies a rotary embedding to its keys.
        rotary: the model's rotary embedding, if it has one that can be called.
        rotary_type: the layer type that `rotary` needs, for models with one table per type.
        sine_first: whether `rotary` returns (sin, cos) instead of (cos, sin).
        bias_owner: module with the table of relative position biases that this layer adds.
        input_std: standard deviation of the block's input. None if it is only known by running the model.
        patches: the patch grid of a vision tower that has one (or one for each stage), else None.
        factor: factor on the norm's output in this block (Falcon-H1), else None.
        calls: number of kernel calls of the layer (two for differential attention).
        rows_by_mask: whether prompt rows are passed together with the attention mask. Needed in layers that pass on no
            other arguments.
        reads_mask: whether the layer itself reads its mask (DeepSeek's indexer), so that there must be one.
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
        """How the layer computes attention itself. None if it calls a kernel."""
        return self.family.own if self.family is not None else None

    @property
    def level(self) -> int:
        """Number of the feature map that the block is part of: that of its stage, or its own."""
        stage = self.patches.stage if self.patches is not None else None
        return self.index if stage is None else stage

    @property
    def is_called(self) -> bool:
        """Whether prompt rows join inside the layer's own forward instead of transformers' AttentionInterface."""
        return self.own is not None or self.is_timm

    @property
    def is_timm(self) -> bool:
        """Whether this is a timm attention layer, which does not use transformers' AttentionInterface."""
        return is_timm_attention(self.attention, self.name)


def find_site(model: nn.Module, path: str, windows: bool = False) -> Site:
    """Describe the attention layer at `path`.

    Args:
        model: the base model.
        path: path of the attention layer.
        windows: whether the layer may attend within windows of a known kind (Swin).

    Raises:
        ValueError: the module at `path` is not an attention layer that prompts can join. A `CannotJoin` if other
            layers of the model may still be joined.
    """
    attention: Any = model.get_submodule(path)
    timm = is_timm_attention(attention, path)
    family = family_of(model, attention, path, windows)
    stage = stage_of(path) if family is not None and family.windows else None
    own = family.own if family is not None else None
    if own is None and not timm and stage is None and not calls_attention_interface(attention):
        raise ValueError(
            f"`target_modules` matched {path!r}, a {type(attention).__name__}, which is not an attention layer that "
            "calls transformers' AttentionInterface. Name the attention layers themselves (for example 'self_attn'), "
            "not their projections, or leave `target_modules` unset."
        )
    if is_cross_attention_layer(path, attention) or id(attention) in decoder_modules(model):
        raise ValueError(
            f"`target_modules` matched {path!r}. Prompts join self-attention only, and in an encoder-decoder that of "
            "the encoder: the decoder sees prompts through the encoder's output. Name layers of the encoder, or leave "
            "`target_modules` unset."
        )
    if own is not None and (reason := own.why_not(attention)) is not None:
        raise CannotJoin(path, attention, reason)
    if timm:
        check_timm(attention, path)
    if getattr(attention, "reorder_and_upcast_attn", False):
        raise ValueError(
            f"{type(attention).__name__} with reorder_and_upcast_attn=True does not use transformers' "
            "AttentionInterface, which prompts need. Load the model with reorder_and_upcast_attn=False."
        )
    block_path, index = block_of(model, path)
    block = model.get_submodule(block_path or path.rpartition(".")[0])
    width = input_width(attention) if stage is None else output_width(attention)
    patches = find_patches(model, path, width, stage)
    rotary = rotary_embedding(model, path) if patches is None and not timm else None
    biases = bias_owner(model, path, attention, own.table if own is not None else None)
    if family is None and not timm:
        check_reachable(model, path, patches, rotary, biases)
    by_mask = family.rows_by_mask if family is not None else not timm and hands_on_its_mask_only(attention)
    kind, names = rotary_type(rotary, attention, block), () if timm else parameter_names(attention)
    # Beam applies rotary embeddings in some kinds of layers only, and Falcon not in models with ALiBi.
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
    """Whether an attention layer applies a soft cap to its scores before the softmax (Gemma 2)."""
    return getattr(attention, "attn_logit_softcapping", None) is not None
