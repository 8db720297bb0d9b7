# SPDX-License-Identifier: Apache-2.0
"""Report on which expert each token of a text chose, layer by layer, as a picture and as an animation.

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
        tokens: tokens of the text, length T.
        experts: (L, T) chosen expert. For top_k above 1, the expert with the largest gate.
        num_experts: number of experts, E.
    """

    layers: list[int]
    tokens: list[str]
    experts: Tensor
    num_experts: int

    def plot(self, path: str | os.PathLike[str] | None = None) -> Picture:
        """Draw the text in the colours of the last layer's experts, above a map of layers by tokens.

        Args:
            path: image file to write. None: no file. A notebook shows the returned picture.
        """
        with extra("report", "plot()"):
            from .pictures import finish
            from .token_picture import draw_tokens

        return finish(draw_tokens(self.layers, self.tokens, self.experts, self.num_experts), path)

    def animate(self, path: str | os.PathLike[str], seconds: float = 0.4) -> None:
        """Write an animation with one frame per layer: a GIF, or an APNG if the path ends in ".png" or ".apng".

        It repeats for ever and shows the last layer longer. To change the background, set matplotlib's `rcParams`, for
        example with `plt.style.context("dark_background")`.

        Args:
            path: file to write.
            seconds: time per layer, in seconds.
        """
        with extra("report", "animate()"):
            from .token_picture import write_animation

        write_animation(path, self.layers, self.tokens, self.experts, self.num_experts, seconds)


def token_routing(
    model: nn.Module, tokens: Sequence[str], sample: int = 0, adapter: str | None = None
) -> TokenRouting:
    """Report which expert each token of one text chose in the last forward pass.

    After `generate` with a key/value cache the report covers the prompt and the generated tokens. The model has not
    read the last generated token, so leave that token out. Do not use beam search: beams change places in the batch.

    Args:
        model: a model with a MEPT adapter with routing="token".
        tokens: tokens of the text without padding, as `tokenizer.convert_ids_to_tokens` returns them.
        sample: number of the text in the batch.
        adapter: name of the adapter. None: the first active one.

    Raises:
        ValueError: the adapter does not route by token, no forward pass was run yet, the batch has no such sample, or
            the sample had another number of tokens.

    Example:

        ```py
        >>> ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=30)
        >>> token_routing(model, tokenizer.convert_ids_to_tokens(ids[0, :-1])).animate("routing.gif")
        ```
    """
    found = routed_layers(model, adapter)
    records = [layer.last_routing.get(name, []) for layer, name in found]
    if not all(records):
        raise ValueError("No forward pass was routed yet. Run the model once before asking for its tokens.")
    if not all(record.by_token for steps in records for record in steps):
        raise ValueError(
            "The adapter has routing='sample': it chooses experts per text, not per token. Use routing_report(model) "
            "instead."
        )
    if not 0 <= sample < len(records[0][0]):
        raise ValueError(
            f"sample={sample} is not in the last batch, which had the samples 0 to {len(records[0][0]) - 1}."
        )
    experts = [torch.cat([_chosen(record, sample) for record in steps]) for steps in records]
    if wrong := [len(row) for row in experts if len(row) != len(tokens)]:
        raise ValueError(
            f"There are {len(tokens)} tokens, but the last forward pass routed {wrong[0]} tokens of sample {sample}. "
            "Pass tokens without padding. After generate, leave out the last token, which the model has not read."
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
