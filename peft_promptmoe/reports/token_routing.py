# SPDX-License-Identifier: Apache-2.0
"""Which expert each token of a text chose, layer by layer: as a picture and as an animation.

Letters: `L` prompted layers, `T` tokens, `E` experts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..extras import extra
from ..routing.record import RoutingRecord
from .routing_report import routed_layers

if TYPE_CHECKING:
    from .pictures import Picture


@dataclass
class TokenRouting:
    """The expert that each token of one text chose in every layer.

    Attributes:
        layers: numbers of the layers, length L.
        tokens: the text's tokens, length T.
        experts: (L, T) the chosen expert; of several, the one with the largest gate.
        num_experts: E.
    """

    layers: list[int]
    tokens: list[str]
    experts: Tensor
    num_experts: int

    def plot(self, path: str | os.PathLike[str] | None = None) -> Picture:
        """The text in the colours of the last layer's experts, above a map of layers by tokens.

        Args:
            path: of an image file to write; unset for none. Notebooks show what is returned.
        """
        with extra("report", "plot()"):
            from .pictures import finish
            from .token_picture import draw_tokens

        return finish(draw_tokens(self.layers, self.tokens, self.experts, self.num_experts), path)

    def animate(self, path: str | os.PathLike[str], seconds: float = 0.4) -> None:
        """Write an animation that goes through the layers: a GIF, or an APNG if the path ends in ".png".

        It repeats for ever and stays longer on the last layer. For another background set matplotlib's `rcParams`, for
        example by `plt.style.context("dark_background")`.

        Args:
            path: of the file to write.
            seconds: that each layer is shown.
        """
        with extra("report", "animate()"):
            from .token_picture import write_animation

        write_animation(path, self.layers, self.tokens, self.experts, self.num_experts, seconds)


def token_routing(
    model: nn.Module, tokens: Sequence[str], sample: int = 0, adapter: str | None = None
) -> TokenRouting:
    """Which expert each token of one text chose in the last forward pass.

    After `generate` with a cache it is of the prompt and of the generated tokens. The model has not read the last
    generated token, so leave that out. Beams of a beam search change places, so generate without one.

    Args:
        model: a model with MEPT that routes by token.
        tokens: the text's tokens without padding, as `tokenizer.convert_ids_to_tokens` gives them.
        sample: number of the text in the batch.
        adapter: which adapter; by default the first active one.

    Raises:
        ValueError: the adapter does not route by token, there has been no forward yet, there is no such sample, or it
            had another number of tokens.

    Example:

        ```py
        >>> ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=30)
        >>> token_routing(model, tokenizer.convert_ids_to_tokens(ids[0, :-1])).animate("routing.gif")
        ```
    """
    found = routed_layers(model, adapter)
    records = [layer.last_routing.get(name, []) for layer, name in found]
    if not all(records):
        raise ValueError("No forward pass has been routed yet; run the model once before asking for its tokens.")
    if not all(record.by_token for steps in records for record in steps):
        raise ValueError(
            "The adapter routes every text as a whole (routing='sample'), so no token chose for itself. "
            "routing_report(model) shows what was chosen."
        )
    if not 0 <= sample < len(records[0][0]):
        raise ValueError(f"The last batch had the samples 0 to {len(records[0][0]) - 1}, and not {sample}.")
    experts = [torch.cat([_chosen(record, sample) for record in steps]) for steps in records]
    if wrong := [len(row) for row in experts if len(row) != len(tokens)]:
        raise ValueError(
            f"tokens has {len(tokens)}, but the last pass routed {wrong[0]} tokens of sample {sample}. Pass them "
            "without padding, and after generate without the last one, which the model has not read."
        )
    layers = [layer.site.index for layer, _ in found]
    return TokenRouting(layers, list(tokens), torch.stack(experts), records[0][0].log_gates.shape[-1])


def _chosen(record: RoutingRecord, sample: int) -> Tensor:
    """(T,) chosen experts of a sample's real tokens."""
    chosen = record.log_gates[sample].argmax(dim=-1).cpu()
    if record.real is None:
        return chosen
    real = record.real.bool().cpu().expand(len(record), chosen.shape[0])
    return chosen[real[sample]]
