# SPDX-License-Identifier: Apache-2.0
"""What every method refuses before the model is touched."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .config import PromptConfig
from .engine.kernels import find_kernel
from .engine.timm_attention import check_fused
from .models.heads import takes
from .models.sites import Site


def no_match(model: nn.Module, config: PromptConfig) -> str:
    """Why `target_modules` has no effect."""
    message = f"target_modules={config.target_modules!r} matches no module of {type(model).__name__}"
    if config.layers_to_transform is not None:
        message += f" within layers_to_transform={config.layers_to_transform!r}"
    if config.modules_to_save:
        message += f" outside modules_to_save={config.modules_to_save!r}"
    return message + ". Leave target_modules unset, or name attention layers of this model."


def check_layers(model: nn.Module, config: PromptConfig, sites: list[Site]) -> None:
    """Refuse numbers of layers that there are not."""
    asked = config.layers_to_transform
    if asked is None:
        return
    missing = {asked} if isinstance(asked, int) else set(asked)
    missing -= {site.index for site in sites}
    if missing:
        raise ValueError(
            f"layers_to_transform names the layers {sorted(missing)}, which {type(model).__name__} does not "
            "have or target_modules leaves out."
        )


def check_saved_modules(model: nn.Module, config: PromptConfig, sites: list[Site]) -> None:
    """Refuse copies of what prompts pass through: the text would go through the copy, prompts through the old."""
    paths = {id(module): path for path, module in model.named_modules()}
    for site in sites:
        parts = site.name.split(".")
        touched = {".".join(parts[: end + 1]) for end in range(len(parts))} | {paths.get(id(site.norm), site.name)}
        for name in config.modules_to_save or ():
            if (path := next((path for path in sorted(touched) if takes(name, path)), None)) is not None:
                raise ValueError(
                    f"modules_to_save={name!r} would copy what the prompts of {site.name!r} pass through: PEFT takes "
                    f"every module whose path ends so, also {path!r}. Leave it out of modules_to_save, write more of "
                    "the path that you mean, or leave that layer out by exclude_modules."
                )


def check_tokens(model: nn.Module, config: PromptConfig) -> None:
    """Refuse tokens to train that the model's embeddings do not have."""
    tokens = config.trainable_token_indices
    if tokens is None:
        return
    if not isinstance(tokens, dict):
        ask = getattr(model, "get_input_embeddings", None)
        own: Any = ask() if ask is not None else None
        tokens = {next((path for path, module in model.named_modules() if module is own), "input embeddings"): tokens}
    for name, ids in tokens.items():
        found = [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
        weights = [weight for module in found if isinstance(weight := getattr(module, "weight", None), Tensor)]
        rows = [weight.shape[0] for weight in weights if weight.ndim == 2]
        if not rows:
            raise ValueError(
                f"trainable_token_indices trains rows of {name!r}, and {type(model).__name__} has no such embeddings "
                "of tokens. Name modules that hold one row for each token, or leave it unset."
            )
        if max(ids) >= min(rows):
            raise ValueError(
                f"trainable_token_indices names token {max(ids)}, and {name!r} has {min(rows)} rows. Call "
                "resize_token_embeddings on the base model first."
            )


def check_attention(site: Site) -> None:
    """Refuse attention kernels that rows cannot join."""
    if site.is_timm:
        check_fused(site.attention, site.name)
    elif site.own is None:
        find_kernel(site.attention.config._attn_implementation_internal)


def check_has_patches(site: Site, method: str) -> None:
    """Refuse attention layers of models without one patch grid."""
    if site.patches is None:
        raise ValueError(
            f"{site.name!r} does not attend over one patch grid, on which {method} works: it is no vision "
            "transformer's, or one's of windows or several resolutions (Swin, Hiera, PVT). Use a plain vision "
            "transformer of transformers or timm."
        )


def check_whole_grid(model: nn.Module, config: PromptConfig, site: Site, method: str) -> None:
    """Refuse settings by which patches get lost, or the patch embedding is not the one that the engine watches."""
    assert site.patches is not None
    dropped = getattr(site.patches.owner, "patch_drop", None)
    if not config.backbone_eval and getattr(dropped, "prob", 0.0) > 0.0:
        raise ValueError(
            f"backbone_eval=False lets the model drop patches in training, and {method} works on all of them. Set "
            "backbone_eval=True, or make the model with patch_drop_rate=0."
        )
    paths = {id(module): path for path, module in model.named_modules()}
    read = [paths[id(site.patches.embedding)], paths[id(site.patches.owner)]]
    for name in config.modules_to_save or ():
        if any(takes(name, part) for path in read for part in _and_above(path)):
            raise ValueError(
                f"modules_to_save={name!r} would copy the patch embedding, by which {method} knows the grid of an "
                "image. Leave it out of modules_to_save."
            )


def _and_above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def refuse_task_type(config: PromptConfig) -> None:
    """Raise ValueError where a config for images asks for one of PEFT's wrappers, which are for text."""
    if config.task_type is not None:
        raise ValueError(
            f"task_type={config.task_type!r} wraps the model in a class of PEFT that passes text on. Leave "
            "task_type unset for vision models; their heads are found without it."
        )
