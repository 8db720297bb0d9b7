# SPDX-License-Identifier: Apache-2.0
"""Reads feature maps of several blocks from a vision backbone, through its library's own interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..models.patches import Grid

Kind = Literal["feature_maps", "hidden_states", "timm"]


@dataclass
class Reader:
    """How to read feature maps from one backbone. It holds no module, so copies of the model and threads can share it.

    Attributes:
        kind: what is read: feature maps (AutoBackbone), hidden states (other models of transformers), or timm's
            intermediates.
        levels: which of them, counted from 0: blocks, or places in the backbone's `out_features`.
        patch: size of a patch in pixels, (rows, columns). Images are padded to multiples of it.
        prefix: number of tokens in front of the patches, for hidden states.
        interpolates: whether the forward pass takes `interpolate_pos_encoding=True`, to accept images of any size.
        widths: channels of each level's map, found by running the backbone once.
        strides: size of each level's cell in pixels, (rows, columns).
        only: (rows, columns) in pixels of the only images that the backbone takes. None: it takes more than one size.
        square: whether it takes square images only.
    """

    kind: Kind
    levels: list[int]
    patch: Grid
    prefix: int = 0
    interpolates: bool = False
    widths: dict[int, int] = field(default_factory=dict)
    strides: dict[int, Grid] = field(default_factory=dict)
    only: Grid | None = None
    square: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the backbone's forward pass."""
        found: dict[str, Any] = {"return_dict": True}
        if self.kind == "hidden_states" and self.levels:
            found["output_hidden_states"] = True
        if self.interpolates:
            found["interpolate_pos_encoding"] = True
        return found

    def read(self, backbone: nn.Module, pixels: Tensor) -> dict[int, Tensor]:
        """Maps (B, D_l, H_l, W_l) by level, from images (B, channels, rows, columns) padded to whole patches."""
        self.check_size(backbone, pixels)
        if self.kind == "timm":
            maps: Any = timm_part(backbone).forward_intermediates(
                pixels, indices=self.levels, intermediates_only=True, output_fmt="NCHW", stop_early=True
            )
            return dict(zip(self.levels, maps, strict=True))
        return self.maps_of(backbone(pixel_values=pixels, **self.arguments()), pixels)

    def maps_of(self, output: Any, pixels: Tensor) -> dict[int, Tensor]:
        """Maps by level, from the output of a model of transformers."""
        if self.kind == "feature_maps":
            if any(each.ndim != 4 for each in output.feature_maps):
                raise ValueError(
                    "The backbone returns tokens, not feature maps. Load it with reshape_hidden_states=True, or set "
                    "backbone.config.reshape_hidden_states = True. If its config has no such entry, use another one."
                )
            return {level: output.feature_maps[level] for level in self.levels}
        rows, columns = (size // patch for size, patch in zip(pixels.shape[-2:], self.patch, strict=True))
        states = [output.hidden_states[level + 1] for level in self.levels]  # the first state is the embedding
        if any(state.ndim != 3 or state.shape[1] != rows * columns + self.prefix for state in states):
            raise ValueError(
                f"The backbone returns tokens of shape {tuple(states[0].shape)} for {rows} x {columns} patches and "
                f"{self.prefix} tokens in front of them. They cannot be put on a grid, because the backbone drops, "
                "merges or adds tokens. Use a plain vision transformer, or an AutoBackbone."
            )
        states = [state[:, self.prefix :].transpose(1, 2).unflatten(2, (rows, columns)) for state in states]
        return dict(zip(self.levels, states, strict=True))

    def check_size(self, backbone: nn.Module, pixels: Tensor) -> None:
        """Refuse images of a size that the backbone does not take.

        Raises:
            ValueError: the backbone takes images of one other size only, or square ones only.
        """
        rows, columns = pixels.shape[-2:]
        if self.square and rows != columns:
            raise ValueError(
                f"This {type(timm_part(backbone)).__name__} takes square images only, and these are, in whole "
                f"patches, {rows} x {columns} pixels. Resize or crop them, or use a backbone that takes any size, "
                "such as DINOv2."
            )
        only = fixed_size(backbone) or self.only
        if only is None or (rows, columns) == only:
            return
        otherwise = "use a backbone that takes any size, such as DINOv2"
        if self.kind == "timm":
            otherwise = (
                "make the model with this img_size, or, where it is a vision transformer, with dynamic_img_size=True"
            )
        raise ValueError(
            f"This {type(timm_part(backbone)).__name__} takes images of {only[0]} x {only[1]} pixels only, and these "
            f"are, in whole patches, {rows} x {columns}. Resize them, or {otherwise}."
        )

    def of(self, levels: Sequence[int]) -> tuple[list[int], Grid]:
        """Widths of these levels, and the stride of the first of them."""
        return [self.widths[level] for level in levels], self.strides[levels[0]]


def timm_part(backbone: nn.Module) -> Any:
    """The timm model inside transformers' wrapper of it, or the backbone itself."""
    return getattr(backbone, "timm_model", backbone)


def fixed_size(backbone: nn.Module) -> Grid | None:
    """Pixels of the only images that a model of timm takes by its own record. None: it takes any, or says nothing."""
    model = timm_part(backbone)
    embedding: Any = getattr(model, "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    is_free = getattr(model, "dynamic_img_size", False) or not getattr(embedding, "strict_img_size", False)
    return None if size is None or is_free else (size[0], size[1])
