# SPDX-License-Identifier: Apache-2.0
"""Finds the patch grid and the prefix tokens of vision transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .inspection import parameter_names

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


Grid = tuple[int, int]


@dataclass
class Patches:
    """How a vision tower turns an image into tokens.

    Attributes:
        embedding: the convolution that turns each patch into one token.
        prefix: number of tokens in front of the patches (class, distillation, registers).
        size: size of a patch in pixels, (rows, columns).
        image_size: size of the model's images in pixels, (rows, columns). None: it takes any size.
        owner: module that adds prefix tokens and positions.
        pads: whether images are padded to whole patches instead of cropped.
        stage: number of the attention layer's stage, in models that merge patches from stage to stage. None: all
            layers have the same patches.
        fixed: whether the model takes images of `image_size` only.
    """

    embedding: nn.Conv2d
    prefix: int
    size: Grid
    image_size: Grid | None
    owner: nn.Module
    pads: bool = False
    stage: int | None = None
    fixed: bool = False

    def grid(self, image_size: Grid) -> Grid:
        """(rows, columns) of patches in an image of `image_size` pixels, at the attention layer's stage."""
        more = (self.size[0] - 1, self.size[1] - 1) if self.pads else (0, 0)
        rows, columns = (image_size[0] + more[0]) // self.size[0], (image_size[1] + more[1]) // self.size[1]
        for _ in range(self.stage or 0):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return rows, columns


def find_patches(model: nn.Module, path: str, width: int, stage: int | None = None) -> Patches | None:
    """Find the patch embedding of the tower to which the attention layer at `path` belongs.

    Args:
        model: the base model.
        path: path of the attention layer.
        width: width of its input. It doubles from stage to stage.
        stage: number of its stage in Swin and models like it, else None.

    Returns:
        None if the tower has not exactly one patch embedding of the attention layer's width: text models, windows,
        pyramids, patches made from another network's features, tokens after the patches.
    """
    attention: Any = model.get_submodule(path)
    config = getattr(attention, "config", None)
    if stage is None and config is not None and (not hasattr(config, "patch_size") or hasattr(config, "depths")):
        return None
    if stage is None and hasattr(model.get_submodule(path.rpartition(".")[0]), "window_size"):
        return None
    tower = path
    found: tuple[str, nn.Module] | None = None
    while tower and found is None:
        tower = tower.rpartition(".")[0]
        modules = model.get_submodule(tower).named_modules(prefix=tower)
        found = next(((name, module) for name, module in modules if isinstance(module, nn.Conv2d)), None)
    if found is None or not _is_patch_embedding(found[1], width >> (stage or 0)):
        return None
    embedding_path = found[0]
    embedding: Any = model.get_submodule(embedding_path)
    owners = [model.get_submodule(name) for name in _ancestors(embedding_path, tower)]
    if any("detection_tokens" in owner._parameters for owner in owners):
        return None
    owner = next((module for module in owners if count_prefix(module) is not None), owners[0])
    return Patches(
        embedding=embedding,
        prefix=(count_prefix(owner) or 0) + _queries_in_front(config, path),
        size=tuple(embedding.kernel_size),
        image_size=_image_size([*owners, config]),
        owner=owner,
        pads=any(getattr(module, "dynamic_img_pad", False) for module in owners),
        stage=stage,
        fixed=any(getattr(module, "strict_img_size", False) for module in owners),
    )


def _queries_in_front(config: Any, path: str) -> int:
    """Number of queries that EoMT puts in front of all other tokens before the last blocks of its encoder."""
    blocks, queries = getattr(config, "num_blocks", None), getattr(config, "num_queries", None)
    number = re.search(r"(?<![^.])\d+(?![^.])", path)
    if blocks is None or queries is None or number is None:
        return 0
    return int(queries) if int(number.group()) >= config.num_hidden_layers - blocks else 0


def hides_patches(owner: nn.Module) -> bool:
    """Whether a module that turns images into tokens leaves some of them out (ViT-MAE)."""
    config = getattr(owner, "config", None)
    return "noise" in parameter_names(owner) and getattr(config, "mask_ratio", 0.0) > 0.0


def says_hidden(owner: nn.Module) -> str:
    """The message about a module that leaves patches out."""
    return (
        f"{type(owner).__name__} masks and shuffles patches, but the adapter needs the whole patch grid. Load the "
        "weights into ViTModel or ViTForImageClassification, or set config.mask_ratio=0 and pass no noise."
    )


def _is_patch_embedding(module: nn.Module, width: int) -> bool:
    if not isinstance(module, nn.Conv2d) or module.out_channels != width:
        return False
    return tuple(module.kernel_size) == tuple(module.stride) and min(module.kernel_size) > 1


def _ancestors(path: str, top: str) -> Iterator[str]:
    while path != top:
        path = path.rpartition(".")[0]
        yield path


def count_prefix(module: nn.Module) -> int | None:
    """Number of tokens that a module puts in front of the patches. None if this module does not do that."""
    known = getattr(module, "num_prefix_tokens", None)  # timm
    if isinstance(known, int):
        return known
    found = [module._parameters.get(name) for name in PREFIX_TOKENS]
    counts = [token.shape[-2] if token.ndim > 1 else 1 for token in found if token is not None]
    return sum(counts) if counts else None


def _image_size(owners: list[Any]) -> Grid | None:
    """Image size from the innermost module or config that has one. timm calls it `img_size`."""
    for owner in owners:
        for name in ("img_size", "image_size"):
            found = getattr(owner, name, None)
            if found is not None:
                return (found, found) if isinstance(found, int) else tuple(found)
    return None
