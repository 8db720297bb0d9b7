# SPDX-License-Identifier: Apache-2.0
"""Finds out how feature maps of several blocks are read from any vision backbone."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import nn

from ..models.patches import Grid, count_prefix
from .reader import Kind, Reader, timm_part
from .trial import measure

# Blocks per task, as shares of the depth. Flow: where DINOv2's features match best. Its last blocks do not match.
SHARES = {"flow": (1 / 3, 5 / 12, 1 / 2), "depth": (1 / 2, 3 / 4, 1.0)}

_NO_PATCHES = (
    "{} does not start with a convolution that turns each patch into one token. Use a plain vision transformer, or an "
    "AutoBackbone."
)
PYRAMID = 32  # pixels of the coarsest cell in models without a patch embedding


def default_levels(task: str, depth: int) -> list[int]:
    """Numbers of the blocks that a task reads in a backbone of `depth` blocks, from 0. For flow with 12: 3, 4, 5."""
    return sorted({max(round(share * depth) - 1, 0) for share in SHARES[task]})


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
    first, embedding = first_convolution(backbone), _patch_embedding(backbone)
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
    measure(reader, backbone, first)
    return reader, chosen


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
    if needed := _needed(backbone):
        raise ValueError(
            f"{type(backbone).__name__} needs {' and '.join(needed)} beside images. Use a plain vision transformer, "
            "or an AutoBackbone."
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
    # Hiera and convolutional networks have several blocks in a stage, and maps of whole stages only.
    depth = min(len(found) for name in ("blocks", "feature_info") if (found := getattr(model, name, None)) is not None)
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


def _needed(backbone: nn.Module) -> list[str]:
    """Arguments beside images without which a model of transformers does not run."""
    found = inspect.signature(inspect.unwrap(type(backbone).forward)).parameters.values()
    named = [p for p in found if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [each.name for each in named[1:] if each.name != "pixel_values"]


def _patch_size(embedding: nn.Conv2d) -> Grid:
    return embedding.kernel_size[0], embedding.kernel_size[1]


def first_convolution(backbone: nn.Module) -> nn.Conv2d:
    """The convolution that an image enters by."""
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(_NO_PATCHES.format(type(backbone).__name__))
    return first


def _patch_embedding(backbone: nn.Module) -> nn.Conv2d | None:
    first = first_convolution(backbone)
    if tuple(first.kernel_size) != tuple(first.stride) or min(first.kernel_size) < 2:
        return None
    return first


def _prefix(backbone: nn.Module, embedding: nn.Conv2d | None) -> int:
    """Number of tokens in front of the patches."""
    if embedding is None:
        raise ValueError(_NO_PATCHES.format(type(backbone).__name__))
    owners = [m for m in backbone.modules() if any(module is embedding for module in m.modules())]
    return next((count for m in reversed(owners) if (count := count_prefix(m)) is not None), 0)
