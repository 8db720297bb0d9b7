# SPDX-License-Identifier: Apache-2.0
"""Reads feature maps of several blocks from any vision backbone, through its library's own interface."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..engine.eval_mode import eval_mode
from ..models.patches import Grid, count_prefix

Kind = Literal["feature_maps", "hidden_states", "timm"]

# Blocks per task, as shares of the depth. Flow: where DINOv2's features match best. Its last blocks do not match.
SHARES = {"flow": (1 / 3, 5 / 12, 1 / 2), "depth": (1 / 2, 3 / 4, 1.0)}

PYRAMID = 32  # pixels of the coarsest cell in models without a patch embedding
PROBE = 16  # patches along a side of the image that shapes are measured with


def default_levels(task: str, depth: int) -> list[int]:
    """Numbers of the blocks that a task reads in a backbone of `depth` blocks, from 0. For flow with 12: 3, 4, 5."""
    return sorted({max(round(share * depth) - 1, 0) for share in SHARES[task]})


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
    """

    kind: Kind
    levels: list[int]
    patch: Grid
    prefix: int = 0
    interpolates: bool = False
    widths: dict[int, int] = field(default_factory=dict)
    strides: dict[int, Grid] = field(default_factory=dict)

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
        if self.kind == "timm":
            self._check_size(backbone, pixels)
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
                    "backbone.config.reshape_hidden_states = True."
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

    @staticmethod
    def _check_size(backbone: nn.Module, pixels: Tensor) -> None:
        only = _only_size(timm_part(backbone))
        if only is not None and tuple(pixels.shape[-2:]) != only:
            raise ValueError(
                f"This {type(timm_part(backbone)).__name__} takes images of {only[0]} x {only[1]} pixels "
                f"only, and these are, in whole patches, {pixels.shape[-2]} x {pixels.shape[-1]}. Resize them, make "
                "the model with this img_size, or, where it is a vision transformer, with dynamic_img_size=True."
            )

    def of(self, levels: Sequence[int]) -> tuple[list[int], Grid]:
        """Widths of these levels, and the stride of the first of them."""
        return [self.widths[level] for level in levels], self.strides[levels[0]]


def make_reader(backbone: nn.Module, levels: dict[str, list[int] | None]) -> tuple[Reader, dict[str, list[int]]]:
    """Find out how to read a backbone. This runs the backbone once, on an empty image.

    Args:
        backbone: an AutoBackbone, another image model of transformers, or a timm model.
        levels: for each task the numbers of its blocks, counted from 0, or None for the task's default. Without tasks
            only the patch size is read: a depth model with its own decoder reads its maps itself.

    Returns:
        The reader, and the levels of each task.

    Raises:
        ValueError: the backbone is of another kind, or does not have these levels.
    """
    if isinstance(backbone, PeftModel):
        raise ValueError(
            "The backbone is already a PeftModel. Build the model on the plain backbone, then add the adapter to "
            "both: get_peft_model(FlowModel(backbone), config)."
        )
    embedding = _patch_embedding(backbone)
    if not levels:
        return Reader("hidden_states", [], (PYRAMID, PYRAMID) if embedding is None else _patch_size(embedding)), {}
    if hasattr(backbone, "out_indices") and hasattr(backbone, "stage_names"):
        kind, chosen = _feature_maps(backbone, levels)
    elif hasattr(timm_part(backbone), "forward_intermediates"):
        kind, chosen = _timm(backbone, levels)
    elif getattr(backbone, "main_input_name", None) == "pixel_values" and hasattr(backbone, "config"):
        kind, chosen = _hidden_states(backbone, levels)
    else:
        raise ValueError(
            f"{type(backbone).__name__} is no backbone that feature maps can be read from. Use an AutoBackbone, an "
            "AutoModel for images, or a vision transformer of timm."
        )
    reader = Reader(
        kind=kind,
        levels=sorted({level for each in chosen.values() for level in each}),
        patch=_patch_size(embedding) if embedding is not None else (1, 1),
        prefix=_prefix(backbone, embedding) if kind == "hidden_states" else 0,
        interpolates=kind == "hidden_states" and "interpolate_pos_encoding" in _arguments(backbone),
    )
    _probe(reader, backbone, embedding)
    return reader, chosen


def timm_part(backbone: nn.Module) -> Any:
    """The timm model inside transformers' wrapper of it, or the backbone itself."""
    return getattr(backbone, "timm_model", backbone)


def _feature_maps(backbone: Any, levels: dict[str, list[int] | None]) -> tuple[Kind, dict[str, list[int]]]:
    stages, given = list(backbone.stage_names), list(backbone.out_features)
    blocks = stages[1:] if stages[0] == "stem" else stages
    chosen = {}
    for task, asked in levels.items():
        names = given if asked is None else [blocks[level] if 0 <= level < len(blocks) else "" for level in asked]
        if missing := [level for level, name in zip(asked or (), names, strict=False) if name not in given]:
            raise ValueError(
                f"levels={asked} needs the maps of the blocks {missing}, but this {type(backbone).__name__} returns "
                f"only {given}. Load it with "
                f"out_indices={[level + len(stages) - len(blocks) for level in asked or ()]}, or leave levels unset "
                "to read all maps that it returns."
            )
        if task == "flow" and asked is None and given == stages[-1:] and len(blocks) > 4:
            middle = [level + len(stages) - len(blocks) for level in default_levels("flow", len(blocks))]
            warnings.warn(
                f"This {type(backbone).__name__} returns the map of its last block only, and last blocks match "
                f"patches badly. Load it with maps of middle blocks, such as out_indices={middle}.",
                stacklevel=4,
            )
        chosen[task] = [given.index(name) for name in names]
    return "feature_maps", chosen


def _hidden_states(backbone: Any, levels: dict[str, list[int] | None]) -> tuple[Kind, dict[str, list[int]]]:
    if "noise" in _arguments(backbone):
        raise ValueError(
            f"{type(backbone).__name__} masks and shuffles patches. Load its weights into the plain model class, such "
            "as ViTModel."
        )
    depth = next((d for d in (_depth(config) for config in _configs(backbone.config)) if d is not None), None)
    if depth is None:
        raise ValueError(
            f"{type(backbone).__name__} is no plain vision transformer: its config has no usable num_hidden_layers. "
            "Load it as an AutoBackbone instead."
        )
    return "hidden_states", _blocks(levels, depth, type(backbone).__name__)


def _timm(backbone: nn.Module, levels: dict[str, list[int] | None]) -> tuple[Kind, dict[str, list[int]]]:
    model = timm_part(backbone)
    depth = len(model.blocks) if hasattr(model, "blocks") else len(model.feature_info)
    return "timm", _blocks(levels, depth, type(model).__name__)


def _blocks(levels: dict[str, list[int] | None], depth: int, name: str) -> dict[str, list[int]]:
    chosen = {task: default_levels(task, depth) if asked is None else asked for task, asked in levels.items()}
    for asked in chosen.values():
        if not all(0 <= level < depth for level in asked):
            raise ValueError(f"levels={asked}: {name} only has the blocks 0 to {depth - 1}.")
    return chosen


def _configs(config: Any) -> Iterator[Any]:
    """The config of the backbone inside a model, if there is one, then the config itself."""
    if getattr(config, "backbone_config", None) is not None:
        yield config.backbone_config
    yield config


def _depth(config: Any) -> int | None:
    found = getattr(config, "num_hidden_layers", None)
    return found if isinstance(found, int) and not hasattr(config, "depths") else None


def _arguments(backbone: nn.Module) -> list[str]:
    return list(inspect.signature(inspect.unwrap(type(backbone).forward)).parameters)


def _patch_size(embedding: nn.Conv2d) -> Grid:
    return embedding.kernel_size[0], embedding.kernel_size[1]


def _patch_embedding(backbone: nn.Module) -> nn.Conv2d | None:
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or tuple(first.kernel_size) != tuple(first.stride) or min(first.kernel_size) < 2:
        return None
    return first


def _prefix(backbone: nn.Module, embedding: nn.Conv2d | None) -> int:
    """Number of tokens in front of the patches."""
    if embedding is None:
        raise ValueError(
            f"{type(backbone).__name__} does not start with a convolution that turns each patch into one token. Use a "
            "plain vision transformer, or an AutoBackbone."
        )
    owners = [m for m in backbone.modules() if any(module is embedding for module in m.modules())]
    return next((count for m in reversed(owners) if (count := count_prefix(m)) is not None), 0)


@torch.no_grad()
def _probe(reader: Reader, backbone: nn.Module, embedding: nn.Conv2d | None) -> None:
    """Run the backbone once, and fill in widths and strides."""
    first: Any = (
        embedding if embedding is not None else next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    )
    size = _probe_size(reader, backbone)
    pixels = torch.zeros(1, first.in_channels, *size, device=first.weight.device, dtype=first.weight.dtype)
    with eval_mode(backbone):
        maps = reader.read(backbone, pixels)
    for level, found in maps.items():
        reader.widths[level] = found.shape[1]
        rows, columns = (length // cells for length, cells in zip(size, found.shape[-2:], strict=True))
        reader.strides[level] = (rows, columns)
    coarsest = [max(stride[axis] for stride in reader.strides.values()) for axis in (0, 1)]
    reader.patch = max(reader.patch[0], coarsest[0]), max(reader.patch[1], coarsest[1])


def _probe_size(reader: Reader, backbone: nn.Module) -> Grid:
    """Image size for the trial run: a small one if the backbone takes any size, otherwise the backbone's own."""
    small = (PROBE * reader.patch[0], PROBE * reader.patch[1]) if reader.patch != (1, 1) else (224, 224)
    if reader.kind == "timm":
        own = getattr(getattr(timm_part(backbone), "patch_embed", None), "img_size", None)
        fixed = own is not None and not getattr(timm_part(backbone), "dynamic_img_size", False)
        return tuple(own) if fixed and own is not None else small
    own = next((s for c in _configs(backbone.config) if (s := getattr(c, "image_size", None)) is not None), None)
    if own is None or reader.interpolates or any(hasattr(m, "interpolate_pos_encoding") for m in backbone.modules()):
        return small
    return (own, own) if isinstance(own, int) else tuple(own)


def _only_size(model: nn.Module) -> Grid | None:
    """Pixels of the only images that a model of timm takes; None if it takes any."""
    embedding: Any = getattr(model, "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    is_free = getattr(model, "dynamic_img_size", False) or not getattr(embedding, "strict_img_size", False)
    return None if size is None or is_free else (size[0], size[1])
