# SPDX-License-Identifier: Apache-2.0
"""Initial prompt rows of text models: the model's own layer inputs for random vocabulary tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.reachable import TROUBLE, CannotJoin
from ..models.sites import Site
from .projection import normed_rows
from .rehearsal import listening, saved_modules_of

REMOVED = 0.05  # largest relative effect of a change of scale on a norm's output (from its epsilon)


def why_unread(model: nn.Module, reader: nn.Module | None, length: int) -> str | None:
    """Why the model cannot be run on `length` vocabulary tokens. None if it can."""
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
    """Number of tokens in the embedding table, 0 if there is none. Another adapter may have wrapped the table."""
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
    """Layer inputs for random vocabulary tokens, at every prompted attention layer that text reaches, without prompts.

    Each row is a separate sequence, so its first slot is like the first position of a text. Causal language models put
    much of their attention there.

    Args:
        model: the base model with its prompt layers.
        reader: the part of the model that reads text (`text_reader`).
        adapter: adapter whose saved modules, such as embeddings, are used.
        rows: number of sequences N.
        length: tokens per sequence P.

    Returns:
        (N, P, D) by path of the attention layer, and the reason if there are none (the model needs other inputs).

    Raises:
        CannotJoin: an attention layer's input is not the one that was expected.
    """
    device = next(reader.parameters()).device
    ids = torch.randint(_vocabulary(reader), (rows, length)).to(device)
    with listening(model) as heard, saved_modules_of(model, adapter):
        try:
            reader(input_ids=ids)
        except CannotJoin:
            raise
        except TROUBLE as error:
            return {}, f"on token ids alone it raises {type(error).__name__} ({str(error).rstrip('.')})"
    return {name: runs[-1].layer_input for name, runs in heard.items()}, None


@torch.no_grad()
def at_unit_scale(site: Site, inputs: Tensor) -> Tensor:
    """Layer inputs divided by one number, so that their median root mean square is 1.

    One number is used for all rows. The rows that get most of a model's attention are a hundred times as large as
    others, and training must move them as little as before.

    Args:
        site: the attention layer.
        inputs: (N, P, D) layer inputs.

    Returns:
        (N, P, D). `inputs` unchanged if there is no norm in front of attention, or one that does not remove scale.
    """
    size = inputs.double().square().mean(dim=-1).sqrt().median()
    if site.norm is None or not (torch.isfinite(size) and size > 0):
        return inputs
    scaled = (inputs / size.to(inputs.dtype)).to(inputs.dtype)
    before, after = normed_rows(site, inputs).double(), normed_rows(site, scaled).double()
    return scaled if bool((after - before).norm() <= REMOVED * before.norm()) else inputs
