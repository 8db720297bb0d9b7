# SPDX-License-Identifier: Apache-2.0
"""Extra key and value rows inside one frozen attention layer of transformers.

A deep prompt is overwritten at the next layer, so all that the real tokens see of it are its key and value rows in
this layer's attention. This module makes those rows with the layer's own norm and projections, places them (rotary
embedding, T5 bias), and appends them at the public `AttentionInterface`. What one call needs travels in that call's
keyword arguments; no module is changed per call, which is what makes threads and `torch.compile` safe.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from .sites import Site, unwrapped_forward

INTERFACE = "promptmoe"
COLUMNS = "promptmoe_columns"
KERNELS = ("sdpa", "eager")

# Score of a slot outside a token's top-k, before the scale. Finite, because it is multiplied with the zeros of the
# other slots' codes, and small enough for float16; times any usual scale its exponential is zero in float64, too.
CLOSED = -3e4


class ConfigView:
    """A layer's config with the attention interface replaced; everything else reads and writes the real one."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "real", real)

    @property
    def _attn_implementation(self) -> str:
        return INTERFACE

    def __getattr__(self, name: str) -> Any:
        if name == "real" or name.startswith("__"):  # not there yet while copying or unpickling
            raise AttributeError(name)
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def __reduce__(self) -> tuple[type[ConfigView], tuple[Any]]:
        return ConfigView, (self.real,)


@dataclass
class Columns:
    """Key and value rows that join one attention call.

    Shapes: `B` batch, `H` key/value heads, `R` prompt rows, `T` query tokens, `G` gates, `d` head width.

    Attributes:
        key: (B or 1, H, R, d), positions already applied.
        value: (B or 1, H, R, d).
        log_gates: (B, T, G) added to the scores of the rows they own, minus infinity for a closed gate; or None.
        owner: (R,) index of the gate that a row answers to, -1 for rows that are always open; None without gates.
        bias: (B or 1, query heads, T, R) relative position bias, for models that have one.
        arrived: how often the attention interface has seen these rows.
    """

    key: Tensor
    value: Tensor
    log_gates: Tensor | None = None
    owner: Tensor | None = None
    bias: Tensor | None = None
    arrived: int = 0


class Harvest:
    """Stands in for `Columns` when the attention layer itself is run on the prompt rows to get their keys and values."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None


def merge_columns(parts: list[Columns]) -> Columns:
    """Rows of several active adapters, side by side."""
    if len(parts) == 1:
        return parts[0]
    batch = max(part.key.shape[0] for part in parts)
    gates, owners, count = [], [], 0
    for part in parts:
        if part.log_gates is None or part.owner is None:
            owners.append(torch.full((part.key.shape[2],), -1, device=part.key.device))
            continue
        owners.append(torch.where(part.owner >= 0, part.owner + count, part.owner))
        gates.append(part.log_gates)
        count += part.log_gates.shape[-1]
    biases = [part.bias for part in parts if part.bias is not None]
    bias_batch = max((bias.shape[0] for bias in biases), default=1)
    return Columns(
        key=torch.cat([part.key.expand(batch, -1, -1, -1) for part in parts], dim=2),
        value=torch.cat([part.value.expand(batch, -1, -1, -1) for part in parts], dim=2),
        log_gates=torch.cat(gates, dim=-1) if gates else None,
        owner=torch.cat(owners) if gates else None,
        bias=torch.cat([bias.expand(bias_batch, -1, -1, -1) for bias in biases], dim=-1) if biases else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The attention interface
# ---------------------------------------------------------------------------------------------------------------------


def promptmoe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a prompted layer: the model's own kernel, over the prompt rows and the text.

    Without rows (adapter disabled, another method's layer) the call passes through untouched.
    """
    columns = kwargs.pop(COLUMNS, None)
    kernel_name = module.config.real._attn_implementation
    kernel = _kernel(module, kernel_name)
    if columns is None:
        return kernel(module, query, key, value, attention_mask, **kwargs)
    if isinstance(columns, Harvest):
        columns.key, columns.value = key, value
        # Of the shape that the output projection takes; heads may be narrower in values than in keys.
        return query.transpose(1, 2)[..., :1].expand(-1, -1, -1, value.shape[-1]), None
    check_kernel(kernel_name)
    columns.arrived += 1
    return _attend(kernel, kernel_name, module, query, key, value, attention_mask, columns, kwargs)


AttentionInterface.register(INTERFACE, promptmoe_attention)


def check_kernel(name: str | None) -> None:
    """Refuse attention kernels whose mask conventions the engine has not been tested with."""
    if name not in KERNELS:
        raise ValueError(
            f"Prompts join attention under {' and '.join(KERNELS)} only, and this model uses {name!r}. Load it with "
            "attn_implementation='sdpa' or call model.set_attn_implementation('sdpa')."
        )


def _kernel(module: nn.Module, name: str | None) -> Any:
    eager = unwrapped_forward(module).__globals__["eager_attention_forward"]
    return eager if name in (None, "eager") else AttentionInterface().get_interface(name, eager)


def _attend(
    kernel: Any,
    kernel_name: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    columns: Columns,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    batch, _, length, width = query.shape
    rows = columns.key.shape[2]
    if columns.key.shape[0] not in (1, batch):
        raise ValueError(
            f"The prompt rows were made for a batch of {columns.key.shape[0]} and attention now runs on {batch}. A cache "
            "that is filled with one batch cannot go on with another; start from a new cache."
        )
    is_causal = kwargs.get("is_causal")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is None and is_causal and length > 1 and kernel_name == "sdpa":
        # The stock kernel would now cut the keys to the first `length`, prompts included.
        key, value = key[:, :, :length], value[:, :, :length]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        mask = F.pad(mask, (rows, 0), value=True if mask.dtype == torch.bool else 0.0)
    bias = kwargs.get("position_bias")
    if bias is not None:
        if columns.bias is None:
            raise ValueError(
                f"{type(module).__name__} adds a relative position bias whose table peft_promptmoe cannot find, so the "
                "prompt rows have no bias. This architecture is not supported."
            )
        prompt_bias = columns.bias.to(bias.dtype)
        common = max(bias.shape[0], prompt_bias.shape[0])
        bias = torch.cat([prompt_bias.expand(common, *prompt_bias.shape[1:]), bias.expand(common, *bias.shape[1:])], -1)
        kwargs = {**kwargs, "position_bias": bias}
    prompt_key = columns.key.to(key.dtype).expand(batch, *columns.key.shape[1:])
    prompt_value = columns.value.to(value.dtype).expand(batch, *columns.value.shape[1:])
    key = torch.cat([prompt_key, key], dim=2)
    value = torch.cat([prompt_value, value], dim=2)
    if columns.log_gates is not None and columns.owner is not None:
        if kwargs.get("softcap") is not None:
            raise ValueError(
                "Token routing adds its gates to the attention scores, and this layer caps them afterwards. Use "
                "routing='sample' with this model."
            )
        if columns.log_gates.requires_grad:
            scaling = kwargs.get("scaling")
            scaling = scaling if scaling is not None else 1.0 / math.sqrt(width)
            kwargs = {**kwargs, "scaling": scaling}
            query, key, value = fold_gates(query, key, value, columns.log_gates, columns.owner, scaling)
        else:
            mask = add_gates(mask, columns.log_gates, columns.owner, query, key)
    output, weights = kernel(module, query, key, value, mask, **kwargs)
    # What was padded to the width comes back as zeros; the prompt columns of the weights have no token to belong to.
    return output[..., :width], None if weights is None else weights[..., rows:]


def fold_gates(
    query: Tensor, key: Tensor, value: Tensor, log_gates: Tensor, owner: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Write gates into queries and keys so that attention adds them to the scores by itself.

    An additive mask would do the same, but one that needs a gradient throws sdpa off its fused kernels and saves the
    attention weights. The gates become extra query features and every row's owner an extra one-hot key feature; the
    widths are filled up to a multiple of 8, which is what the fused kernels take.

    Args:
        query: (B, Hq, T, d).
        key, value: (B, H, R + S, d), the prompt rows first.
        log_gates: (B, T, G), minus infinity for closed gates.
        owner: (R,) gate of each prompt row, -1 for none.
        scaling: factor of the scores.

    Returns:
        query, key and value of width d + G, filled up to a multiple of 8.
    """
    width, gates = query.shape[-1], log_gates.shape[-1]
    fill = -(width + gates) % 8
    opened = (log_gates / scaling).clamp(min=CLOSED).to(query.dtype)
    opened = F.pad(opened, (0, fill))[:, None].expand(-1, query.shape[1], -1, -1)
    code = (owner[:, None] == torch.arange(gates + fill, device=owner.device)).to(key.dtype)
    code = F.pad(code, (0, 0, 0, key.shape[2] - code.shape[0])).expand(*key.shape[:2], -1, -1)
    query = torch.cat([query, opened], dim=-1)
    key = torch.cat([key, code], dim=-1)
    return query, key, F.pad(value, (0, gates + fill))


def add_gates(mask: Tensor | None, log_gates: Tensor, owner: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The attention mask with the gates added to the columns of the rows they own.

    Returns:
        (B, 1, T, R + S) additive mask in the dtype of `query`.
    """
    by_row = log_gates[..., owner.clamp(min=0)].masked_fill(owner < 0, 0.0).to(query.dtype)  # (B, T, R)
    gates = F.pad(by_row, (0, key.shape[2] - owner.shape[0]))[:, None]
    if mask is None:
        return gates
    if mask.dtype == torch.bool:
        return gates.masked_fill(~mask, torch.finfo(query.dtype).min)
    return gates + mask


# ---------------------------------------------------------------------------------------------------------------------
# From prompt rows to key and value rows
# ---------------------------------------------------------------------------------------------------------------------


def real_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """Which tokens of a sequence are text and which padding, read off the attention mask.

    A token that may see itself is real: in every mask of transformers a padded column is closed for all queries, its
    own included, whatever the padding side, window or causality.

    Args:
        mask: (B, 1, T or 1, S) boolean or additive mask, or None for no padding.
        length: T.

    Returns:
        (B, T) boolean, or None where nothing is padded.
    """
    if mask is None:
        return None
    if mask.ndim != 4:
        raise ValueError(
            f"peft_promptmoe reads padding from 4-D attention masks and got one of shape {tuple(mask.shape)}; it "
            "supports the sdpa and eager kernels, use one of them."
        )
    open_ = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if mask.shape[2] == 1:
        return open_[:, 0, 0, :length]
    return torch.diagonal(open_[:, 0], dim1=-2, dim2=-1)[:, :length]


def first_real(real: Tensor | None) -> Tensor | None:
    """(B,) column of each sample's first real token; None where no sample is padded."""
    return None if real is None else real.to(torch.int8).argmax(dim=-1)


def rotary_tables(
    site: Site, position_embeddings: Any, first: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines for prompt rows that stand `offsets` away from each sample's first real token.

    The first token's own angle comes from the tables that the layer was given and the offset's from the model's rotary
    module; the sum of angles needs neither position ids nor the layout of the tables.

    Args:
        position_embeddings: (cos, sin), each (B or 1, T, r), as the attention layer receives them; None if it has none.
        first: (B,) column of the first real token, None for column 0 of all.
        offsets: (R,) integers; None puts every row where the first token is ("unrotated").

    Returns:
        (cos, sin), each (B or 1, R or 1, r).
    """
    if position_embeddings is None:
        return None
    if not (isinstance(position_embeddings, (tuple, list)) and len(position_embeddings) == 2) or any(
        not isinstance(table, Tensor) or table.ndim != 3 for table in position_embeddings
    ):
        raise ValueError(f"{type(site.attention).__name__} takes rotary tables of a form peft_promptmoe does not know.")
    cos, sin = position_embeddings
    if first is None:
        cos, sin = cos[:, :1], sin[:, :1]
    else:
        index = first[:, None, None].expand(-1, 1, cos.shape[-1])
        cos = cos.expand(first.shape[0], -1, -1).gather(1, index)
        sin = sin.expand(first.shape[0], -1, -1).gather(1, index)
    if offsets is None:
        return cos, sin
    if site.rotary is None or rotary_kind(site) in LENGTH_DEPENDENT:
        raise ValueError(
            f"prompt_positions='prefix' needs the rotary angles of the positions before the text, and "
            f"{type(site.attention).__name__} has none that can be reached or has frequencies that depend on the text's "
            "length. Use prompt_positions='unrotated' with this model."
        )
    named = {"layer_type": site.rotary_type} if site.rotary_type is not None else {}
    by_cos, by_sin = site.rotary(cos, offsets[None], **named)
    scale = rotary_scaling(site)
    return (cos * by_cos - sin * by_sin) / scale, (sin * by_cos + cos * by_sin) / scale


LENGTH_DEPENDENT = ("dynamic", "longrope")


def rotary_kind(site: Site) -> str:
    """Type of the rotary embedding ("default", "yarn", ...)."""
    kind = getattr(site.rotary, "rope_type", "default")
    return kind.get(site.rotary_type, "default") if isinstance(kind, dict) else kind


def rotary_scaling(site: Site) -> float:
    """Factor that the rotary module puts on its cosines and sines (1 but for YaRN and its kin)."""
    name = f"{site.rotary_type}_attention_scaling" if site.rotary_type is not None else "attention_scaling"
    return getattr(site.rotary, name, 1.0)


def relative_bias(site: Site, first: Tensor | None, offsets: Tensor, length: int) -> Tensor | None:
    """T5 bias between each query and prompt rows `offsets` away from the first real token.

    Returns:
        (B or 1, heads, T, R), or None for models without such a table.
    """
    owner = site.bias_owner
    if owner is None:
        return None
    start = first[:, None, None] if first is not None else 0
    query = torch.arange(length, device=offsets.device)[None, :, None]
    distance = offsets[None, None, :] + start - query
    return bias_at(owner, distance)


def bias_at(owner: Any, distance: Tensor) -> Tensor:
    """Entries of a T5 table for distances key - query.

    Args:
        owner: the attention layer that holds the table.
        distance: (B, T, R) integers.

    Returns:
        (B, heads, T, R).
    """
    settings = {}
    if "bidirectional" in inspect.signature(owner._relative_position_bucket).parameters:  # UMT5 reads its own
        settings = {
            "bidirectional": not owner.is_decoder,
            "num_buckets": owner.relative_attention_num_buckets,
            "max_distance": owner.relative_attention_max_distance,
        }
    return owner.relative_attention_bias(owner._relative_position_bucket(distance, **settings)).permute(0, 3, 1, 2)


def project_rows(site: Site, rows: Tensor, tables: tuple[Tensor, Tensor] | None, bound: dict[str, Any]) -> Columns:
    """Key and value rows of prompt rows, by the layer's own norm and projections.

    Families of the table project directly; elsewhere the layer itself is run on the rows ("harvest"), which gives the
    same result and also pays the query and output projections.

    Args:
        rows: (B or 1, R, D) in the place of layer inputs.
        tables: rotary (cos, sin) for the rows, each (B or 1, R, r).
        bound: the attention call's arguments by name, from which a harvest takes its own.
    """
    normed = site.norm(rows) if site.norm is not None else rows
    if site.family is None:
        return harvest(site, normed, tables, bound)
    return project_directly(site, normed, tables)


def project_directly(site: Site, normed: Tensor, tables: tuple[Tensor, Tensor] | None) -> Columns:
    """Key and value rows through the projections that the family's table entry names."""
    family, attention = site.family, site.attention
    assert family is not None
    width = getattr(attention, family.head_dim)
    if family.fused is not None:
        key, value = _fused_projection(getattr(attention, family.fused), normed)
    else:
        key, value = getattr(attention, family.key)(normed), getattr(attention, family.value)(normed)
    key = key.unflatten(-1, (-1, width)).transpose(1, 2)
    value = value.unflatten(-1, (-1, width)).transpose(1, 2)
    if family.key_norm is not None:
        key = getattr(attention, family.key_norm)(key)
    if tables is not None:
        rotate = unwrapped_forward(attention).__globals__["apply_rotary_pos_emb"]
        tables = (tables[0].to(key.dtype), tables[1].to(key.dtype))
        # The function rotates a query and a key; the key stands in for both.
        key = rotate(key, key, *tables)[1]
    return Columns(key, value.expand(key.shape[0], -1, -1, -1))


def _fused_projection(projection: nn.Module, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a projection that makes query, key and value in this order."""
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if type(projection) is nn.Linear and isinstance(weight, Tensor):
        third = weight.shape[0] // 3
        return F.linear(normed, weight[third:], None if bias is None else bias[third:]).chunk(2, dim=-1)  # type: ignore
    if type(projection).__name__ == "Conv1D" and isinstance(weight, Tensor):
        third = weight.shape[1] // 3
        return F.linear(normed, weight[:, third:].T, None if bias is None else bias[third:]).chunk(2, dim=-1)  # type: ignore
    # Another adapter or a quantiser has wrapped it: the module itself knows best.
    _, key, value = projection(normed).chunk(3, dim=-1)
    return key, value


def parameter_names(attention: nn.Module) -> tuple[str, ...]:
    """Names of the attention layer's positional arguments, in order."""
    return tuple(inspect.signature(unwrapped_forward(attention)).parameters)[1:]


def harvest(site: Site, normed: Tensor, tables: tuple[Tensor, Tensor] | None, bound: dict[str, Any]) -> Columns:
    """Key and value rows by running the attention layer on the prompt rows and stopping at the interface."""
    attention, caught = site.attention, Harvest()
    batch = max(normed.shape[0], tables[0].shape[0] if tables is not None else 1)
    arguments = {name: value for name, value in bound.items() if name not in _NOT_FOR_PROMPTS}
    accepted = inspect.signature(unwrapped_forward(attention)).parameters
    arguments |= {name: None for name in _NOT_FOR_PROMPTS if name in accepted}
    arguments["hidden_states"] = normed.expand(batch, -1, -1)
    if tables is not None:
        arguments["position_embeddings"] = tuple(table.expand(batch, normed.shape[1], -1) for table in tables)
    attention.forward(**arguments, **{COLUMNS: caught})
    if caught.key is None or caught.value is None:
        raise RuntimeError(
            f"{type(attention).__name__} did not reach transformers' AttentionInterface when run on prompt rows; this "
            "architecture is not supported."
        )
    return Columns(caught.key, caught.value)


_NOT_FOR_PROMPTS = (
    "attention_mask",
    "mask",
    "past_key_values",
    "layer_past",
    "position_bias",
    "cache_position",
    "position_ids",
    "output_attentions",
    COLUMNS,
)
