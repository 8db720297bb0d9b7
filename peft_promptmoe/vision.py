# SPDX-License-Identifier: Apache-2.0
"""What vision transformers have and text models have not: a patch grid, prefix tokens, heads that PEFT cannot name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .inspection import parameter_names

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")

# Heads of transformers' vision models, children of the model itself; timm's are asked for by `get_classifier`.
HEADS = (
    "classifier",
    "cls_classifier",
    "distillation_classifier",
    "head",
    "decode_head",
    "auxiliary_head",
    "fpn",
    "neck",
)

Grid = tuple[int, int]


@dataclass
class Patches:
    """How a vision tower makes tokens of an image.

    Attributes:
        embedding: the convolution that makes one token of each patch.
        prefix: tokens in front of the patches: class, distillation, registers.
        size: pixels of a patch, (rows, columns).
        image_size: pixels of the model's own images, (rows, columns); None where it takes any.
        owner: the module that adds prefix tokens and positions.
        pads: whether images are padded to whole patches, not cropped.
    """

    embedding: nn.Conv2d
    prefix: int
    size: Grid
    image_size: Grid | None
    owner: nn.Module
    pads: bool = False

    def grid(self, image_size: Grid) -> Grid:
        """Rows and columns of patches in an image of `image_size` pixels."""
        more = (self.size[0] - 1, self.size[1] - 1) if self.pads else (0, 0)
        return (image_size[0] + more[0]) // self.size[0], (image_size[1] + more[1]) // self.size[1]


def find_patches(model: nn.Module, path: str, width: int) -> Patches | None:
    """The patch embedding of the tower that the attention layer at `path` belongs to.

    Returns:
        None where there is no single one of the attention layer's width: text, windows, pyramids, patches of another
        network's features, tokens behind the patches.
    """
    attention: Any = model.get_submodule(path)
    config = getattr(attention, "config", None)
    if config is not None and (not hasattr(config, "patch_size") or hasattr(config, "depths")):
        return None
    if hasattr(model.get_submodule(path.rpartition(".")[0]), "window_size"):
        return None
    tower = path
    found: tuple[str, nn.Module] | None = None
    while tower and found is None:
        tower = tower.rpartition(".")[0]
        modules = model.get_submodule(tower).named_modules(prefix=tower)
        found = next(((name, module) for name, module in modules if isinstance(module, nn.Conv2d)), None)
    if found is None or not _is_patch_embedding(found[1], width):
        return None
    embedding_path = found[0]
    embedding: Any = model.get_submodule(embedding_path)
    owners = [model.get_submodule(name) for name in _ancestors(embedding_path, tower)]
    if any("detection_tokens" in owner._parameters for owner in owners):
        return None
    owner = next((module for module in owners if count_prefix(module) is not None), owners[0])
    return Patches(
        embedding=embedding,
        prefix=count_prefix(owner) or 0,
        size=tuple(embedding.kernel_size),
        image_size=_image_size([*owners, config]),
        owner=owner,
        pads=any(getattr(module, "dynamic_img_pad", False) for module in owners),
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
    """Tokens that a module puts in front of the patches; None if it is not the one that does."""
    known = getattr(module, "num_prefix_tokens", None)  # timm
    if isinstance(known, int):
        return known
    found = [module._parameters.get(name) for name in PREFIX_TOKENS]
    counts = [token.shape[-2] if token.ndim > 1 else 1 for token in found if token is not None]
    return sum(counts) if counts else None


def _image_size(owners: list[Any]) -> Grid | None:
    """Size as the innermost of the modules and configs that knows one has it; timm says `img_size`."""
    for owner in owners:
        for name in ("img_size", "image_size"):
            found = getattr(owner, name, None)
            if found is not None:
                return (found, found) if isinstance(found, int) else tuple(found)
    return None


class GridBook:
    """The patch grids that have come through one patch embedding, by their number of patches.

    A layer sees tokens in a row and asks here how many rows and columns they are. What is written is never changed, so
    threads, checkpointed blocks that are run again and later forwards read the same.

    Args:
        patches: the tower's patch embedding.

    Attributes:
        grids: rows and columns by number of patches.
        readers: the layers that may read here; nothing is written or changed while none of them does.
    """

    def __init__(self, patches: Patches) -> None:
        self.patches = patches
        self.grids: dict[int, Grid] = {}
        self.readers: list[Any] = []
        self._names = parameter_names(patches.owner)
        self._handles: list[Any] = []

    def attach(self) -> None:
        self._handles = [
            self.patches.embedding.register_forward_hook(self._after_embedding),
            self.patches.owner.register_forward_pre_hook(self._before_owner, with_kwargs=True),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, tokens: int) -> Grid:
        """Grid of a sequence of `tokens` tokens, prefix included.

        Raises:
            ValueError: no image of so many patches has come through the patch embedding: patches were dropped.
        """
        count = tokens - self.patches.prefix
        grid = self.grids.get(count)
        if grid is None:
            raise ValueError(
                f"The prompts are made from the whole patch grid, and this layer got {count} patches, which is the "
                f"grid of none of the images so far ({sorted(self.grids.values())}): patches were dropped on the way. "
                "Switch patch dropout and masking off."
            )
        return grid

    def _is_read(self) -> bool:
        return any(reader.uses_grid(name) for reader in self.readers for name in reader.working_adapters())

    def _after_embedding(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if not self._is_read():
            return
        rows, columns = output.shape[-2:]
        known = self.grids.get(rows * columns)
        if known is None:
            known = self.grids.setdefault(rows * columns, (rows, columns))
        if known != (rows, columns):
            raise ValueError(
                f"This model has seen images of {known[0]} x {known[1]} patches and now gets {rows} x {columns}, as "
                "many in another shape, which its layers cannot tell apart. Bring all images to one shape."
            )

    def _before_owner(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the patches in order where the model would shuffle them (ViT-MAE)."""
        if "noise" not in self._names or not self._is_read():
            return None
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        ratio = getattr(getattr(owner, "config", None), "mask_ratio", 0.0)
        if ratio > 0.0 or bound.get("noise") is not None:
            raise ValueError(
                f"{type(owner).__name__} hides and shuffles patches, and these prompts are made from the whole patch "
                "grid. Load the weights into ViTModel or ViTForImageClassification, or set config.mask_ratio=0 and "
                "pass no noise."
            )
        pixels = bound["pixel_values"]
        rows, columns = self.patches.grid(tuple(pixels.shape[-2:]))
        noise = torch.arange(rows * columns, device=pixels.device).expand(pixels.shape[0], -1)
        position = self._names.index("noise")
        if len(args) > position:
            return (*args[:position], noise, *args[position + 1 :]), kwargs
        return args, {**kwargs, "noise": noise}


def vision_heads(model: nn.Module, patches: Patches) -> list[str]:
    """Names of the heads of an image model that train along with prompts."""
    # A bare encoder has no head; what is called so there (SigLIP) pools.
    bare = any(child is patches.owner for child in model.children()) or patches.owner is model
    children = [] if bare else model.named_children()
    found = [name for name, child in children if name in HEADS and _has_parameters(child)]
    backbone: Any = getattr(model, "timm_model", model)
    if not hasattr(backbone, "get_classifier"):
        return found
    heads = backbone.get_classifier()
    wanted = {id(head) for head in (heads if isinstance(heads, tuple) else (heads,)) if _has_parameters(head)}
    return found + [name for name, module in model.named_modules() if id(module) in wanted]


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None


def set_frozen_eval(module: nn.Module) -> list[nn.Module]:
    """Put what is frozen below a training module into evaluation mode: its dropout and stochastic depth are off.

    Modules that checkpoint stay in training mode, in which alone transformers checkpoints; their parts do not.

    Returns:
        The modules whose mode has changed.
    """
    changed = []
    for child in module.children():
        parameters = list(child.parameters())
        trained = bool(parameters) and all(parameter.requires_grad for parameter in parameters)
        if trained or isinstance(child, BaseTunerLayer):
            continue
        if child.training and not hasattr(child, "gradient_checkpointing"):
            child.training = False
            changed.append(child)
        changed += set_frozen_eval(child)
    return changed
