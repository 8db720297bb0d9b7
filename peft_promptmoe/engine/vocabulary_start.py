# SPDX-License-Identifier: Apache-2.0
"""Initial prompt rows of text models: the model's own layer inputs on random vocabulary tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.reachable import TROUBLE, CannotJoin
from ..models.sites import Site
from .projection import normed_rows
from .rehearsal import listening, saved_modules_of

REMOVED = 0.05  # what a norm's epsilon may leave of a change of scale, of the size of its output


def why_unread(model: nn.Module, reader: nn.Module | None, length: int) -> str | None:
    """Why the model cannot be run on texts of `length` vocabulary tokens; None if it can."""
    if reader is None:
        return "it does not read token ids alone"
    # RoBERTa counts its positions from 2.
    positions = getattr(reader.config, "max_position_embeddings", None)
    if isinstance(positions, int) and length + 2 > positions:
        return f"it has {positions} positions, too few for num_virtual_tokens={length}"
    if any(parameter.is_meta for parameter in reader.parameters()):
        return "its weights are not in memory"
    return None if _vocabulary(reader) else "it has no table of token embeddings"


def _vocabulary(reader: Any) -> int:
    """Tokens that the embeddings have rows for; 0 if they are no table. They may be another adapter's by now."""
    try:
        embeddings = reader.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return 0
    weight = getattr(embeddings, "weight", None)
    rows = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0
    return int(getattr(embeddings, "num_embeddings", rows))


def vocabulary_inputs(
    model: nn.Module, reader: nn.Module, adapter: str, rows: int, length: int
) -> tuple[dict[str, Tensor], str | None]:
    """Layer inputs on random vocabulary tokens at every prompted attention layer that text reaches, without prompts.

    Each row is a sequence of its own, so its first slot has what a model keeps in the first position of a text; causal
    language models rest their attention there.

    Args:
        model: the base model, prompt layers in place.
        reader: what of it reads text (`text_reader`).
        adapter: whose saved modules, such as embeddings, are to be used.
        rows: sequences N.
        length: tokens per sequence P.

    Returns:
        (N, P, D) by path of the attention layer, and why there are none: where the model wants more than token ids.

    Raises:
        CannotJoin: an attention layer's input is not what it was taken for.
    """
    device = next(reader.parameters()).device
    ids = torch.randint(_vocabulary(reader), (rows, length)).to(device)
    with listening(model) as heard, saved_modules_of(model, adapter):
        try:
            reader(input_ids=ids)
        except CannotJoin:
            raise
        except TROUBLE as error:
            return {}, f"run on token ids alone it ends in {type(error).__name__} ({str(error).rstrip('.')})"
    return {name: runs[-1].layer_input for name, runs in heard.items()}, None


@torch.no_grad()
def at_unit_scale(site: Site, inputs: Tensor) -> Tensor:
    """Layer inputs divided by one number, so that the root mean square of the middle one is 1.

    One number and not one for each row: the rows that a model rests its attention on are a hundred times as large as
    others, and have to move as little as they did for attention to stay where it is.

    Args:
        site: the attention layer.
        inputs: (N, P, D).

    Returns:
        (N, P, D); `inputs` itself where there is no norm in front of attention, or one that lets scale through.
    """
    size = inputs.double().square().mean(dim=-1).sqrt().median()
    if site.norm is None or not (torch.isfinite(size) and size > 0):
        return inputs
    scaled = (inputs / size.to(inputs.dtype)).to(inputs.dtype)
    before, after = normed_rows(site, inputs).double(), normed_rows(site, scaled).double()
    return scaled if bool((after - before).norm() <= REMOVED * before.norm()) else inputs
