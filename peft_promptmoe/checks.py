# SPDX-License-Identifier: Apache-2.0
"""Checks of config and model that every method runs before it changes the model."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from .adapter_state import PROMPT_CHILD
from .config import PromptConfig
from .engine.kernels import find_kernel
from .engine.timm_attention import check_fused
from .models.heads import takes, text_heads
from .models.patches import hides_patches, says_hidden
from .models.sites import Site
from .models.surroundings import block_of, stage_of
from .sharing.rollback import running_load

# Settings that select all blocks.
ALL_BLOCKS: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None}


def is_target(model: nn.Module, config: Any, path: str) -> Any:
    """PEFT's rule for target modules, with `layers_to_transform` also for regular expressions and full paths."""
    asked, targets, staged = config.layers_to_transform, config.target_modules, stage_of(path) is not None
    # PEFT would count blocks in stages within their stage.
    found = check_target_module_exists(_changed(config, ALL_BLOCKS) if staged else config, path)
    if not found or asked is None or not (staged or isinstance(targets, str) or path in targets):
        return found
    return _block(model, config, path) in _several(asked)


def _changed(config: Any, settings: dict[str, Any]) -> Any:
    other = copy.copy(config)
    for name, value in settings.items():
        setattr(other, name, value)
    return other


def _block(model: nn.Module, config: Any, path: str) -> int | None:
    """Number of the block in a path (see `block_of`), or the number after `layers_pattern`."""
    block, number = block_of(model, path)
    if not (named := config.layers_pattern):
        return number if block else None
    lists = "|".join(f"(?:{name})" for name in ([named] if isinstance(named, str) else named))
    match = re.search(rf"(?:^|\.)(?:{lists})[.](\d+)(?=\.)", path)
    return int(match.group(1)) if match is not None else None


def _several(layers: Any) -> set[int]:
    return {layers} if isinstance(layers, int) else set(layers)


def no_match(model: nn.Module, config: PromptConfig, chosen: bool) -> str:
    """The message that says why no attention layer matches the config.

    Args:
        chosen: whether `target_modules` was unset, and so chosen by the package.
    """
    name = type(model).__name__
    free = _paths(model, config, **ALL_BLOCKS)
    if config.layers_to_transform is not None and free:
        if config.layers_pattern and not any(_block(model, config, path) is not None for path in free):
            return (
                f"layers_pattern={config.layers_pattern!r} names no list of blocks in the paths of {name}'s attention "
                f"layers, such as {free[0]!r}. Leave layers_pattern unset, or name the module that holds the blocks."
            )
        return _no_such_layer(model, config, _several(config.layers_to_transform), chosen)
    field = left_out_by(model, config)
    if field == "exclude_modules":
        return (
            f"exclude_modules={config.exclude_modules!r} leaves out all attention layers of {name} that prompts can "
            "join. Exclude fewer layers, or leave exclude_modules unset."
        )
    if field == "modules_to_save":
        return (
            f"modules_to_save={config.modules_to_save!r} copies all attention layers of {name} that prompts can join, "
            "and prompts cannot join a copied layer. Name heads only in modules_to_save."
        )
    if running_load() is not None:
        made_for = f": {config.base_model_name_or_path!r:.200}." if config.base_model_name_or_path else "."
        return (
            f"The adapter was made for attention layers that {name} does not have ({config.target_modules!r}). Load "
            f"it onto the base model it was made for{made_for}"
        )
    if config.base_record is not None and not chosen:
        return (
            f"This config was used for another model before, which has set target_modules={config.target_modules!r}, "
            f"but {name} has no such layers. Make a new config for each model."
        )
    return (
        f"target_modules={config.target_modules!r} matches no module of {name}. Leave target_modules unset, or name "
        "attention layers of this model."
    )


def _paths(model: nn.Module, config: PromptConfig, **changed: Any) -> list[str]:
    """The paths that the config would match with some settings changed."""
    other = _changed(config, changed)
    paths = (path for path, _ in model.named_modules() if path and PROMPT_CHILD not in path.split("."))
    return [path for path in paths if is_target(model, other, path)]


def left_out_by(model: nn.Module, config: PromptConfig) -> str | None:
    """Which of `exclude_modules` and `modules_to_save` keeps layers from getting prompts. None if neither does."""
    matched = _paths(model, config, **ALL_BLOCKS)
    for fields in (["exclude_modules"], ["modules_to_save"], ["exclude_modules", "modules_to_save"]):
        if len(_paths(model, config, **ALL_BLOCKS, **dict.fromkeys(fields))) > len(matched):
            return fields[0]
    return None


def _no_such_layer(model: nn.Module, config: PromptConfig, missing: set[int], chosen: bool) -> str:
    """The message about numbers in `layers_to_transform` that belong to no prompted layer."""
    there = _numbers(model, config, _paths(model, config, **ALL_BLOCKS))
    every = _numbers(model, config, _paths(model, config, **ALL_BLOCKS, exclude_modules=None, modules_to_save=None))
    whole = there == list(range(len(there)))
    known = f"{there[0]} to {there[-1]}" if whole and len(there) > 1 else ", ".join(map(str, there)) or "none"
    name = type(model).__name__
    if not missing:
        return (
            f"layers_to_transform={config.layers_to_transform!r} leaves no layer of {name} to prompt. Leave it unset "
            f"for all layers, or choose from {known}."
        )
    strange = missing - set(every)
    subject = f"layers_to_transform names {_named(strange or missing)}"
    if strange:
        may = "that prompts can join" if chosen else f"that target_modules={config.target_modules!r} names"
        return f"{subject}, not among the layers of {name} {may}: {known} (counted from 0).{_used_before(config)}"
    without = _numbers(model, config, _paths(model, config, **ALL_BLOCKS, exclude_modules=None))
    if missing & set(without):
        return (
            f"layers_to_transform names {_named(missing & set(without))}, but exclude_modules="
            f"{config.exclude_modules!r} leaves this out. Remove it from one of the two."
        )
    return (
        f"{subject}, but modules_to_save={config.modules_to_save!r} makes a copy of this, and prompts cannot join a "
        "copied layer. Name heads only in modules_to_save."
    )


def _numbers(model: nn.Module, config: PromptConfig, paths: list[str]) -> list[int]:
    return sorted({number for path in paths if (number := _block(model, config, path)) is not None})


def _named(numbers: set[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))}"


def _used_before(config: PromptConfig) -> str:
    if config.base_record is None:
        return ""
    if running_load() is not None:
        return " Load the adapter onto the base model it was made for."
    return (
        " This config was used for another model before, which may have set layers_to_transform. Make a new config "
        "for each model."
    )


def check_layers(model: nn.Module, config: PromptConfig, sites: list[Site], chosen: bool) -> None:
    """Raise ValueError if `layers_to_transform` names layers that do not exist or that other settings leave out.

    Args:
        chosen: whether `target_modules` was unset, and so chosen by the package.
    """
    asked = config.layers_to_transform
    if asked is None:
        return
    missing = _several(asked) - {_block(model, config, site.name) for site in sites}
    if missing:
        raise ValueError(_no_such_layer(model, config, missing, chosen))


def check_saved_modules(model: nn.Module, config: PromptConfig, sites: list[Site]) -> None:
    """Raise ValueError if `modules_to_save` copies a module that prompts use: the model would run the copy instead."""
    paths = {id(module): path for path, module in model.named_modules()}
    for site in sites:
        parts = site.name.split(".")
        touched = {".".join(parts[: end + 1]) for end in range(len(parts))} | {paths.get(id(site.norm), site.name)}
        for name in config.modules_to_save or ():
            if (path := next((path for path in sorted(touched) if takes(name, path)), None)) is not None:
                raise ValueError(
                    f"modules_to_save={name!r} would copy what the prompts of {site.name!r} pass through: PEFT copies "
                    f"every module whose path ends with this name, also {path!r}. Remove it from modules_to_save, "
                    "write more of the path that you mean, or leave that layer out with exclude_modules."
                )


def check_tokens(model: nn.Module, config: PromptConfig) -> None:
    """Raise ValueError if `trainable_token_indices` names tokens that the embeddings do not have."""
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
                f"trainable_token_indices names {name!r}, but {type(model).__name__} has no such token embeddings. "
                "Name modules with one row per token, or leave trainable_token_indices unset."
            )
        if max(ids) >= min(rows):
            raise ValueError(
                f"trainable_token_indices names token {max(ids)}, but {name!r} has {min(rows)} rows. Call "
                "resize_token_embeddings on the base model first."
            )


def check_attention(site: Site) -> None:
    """Raise ValueError if prompts cannot join the attention kernel in use."""
    if site.is_timm:
        check_fused(site.attention, site.name)
    elif site.own is None:
        find_kernel(site.attention.config._attn_implementation_internal)


def check_has_patches(site: Site, method: str) -> None:
    """Raise ValueError if the attention layer does not attend over one patch grid."""
    if site.patches is None:
        raise ValueError(
            f"{site.name!r} does not attend over one patch grid, which {method} needs. Either the model is no vision "
            "transformer, or it has windows or several resolutions. Use a plain one of transformers or timm."
        )


def check_whole_grid(model: nn.Module, config: PromptConfig, site: Site, method: str) -> None:
    """Raise ValueError if patches can be dropped, or if `modules_to_save` copies the patch embedding."""
    assert site.patches is not None
    if hides_patches(site.patches.owner):
        raise ValueError(says_hidden(site.patches.owner))
    dropped = getattr(site.patches.owner, "patch_drop", None)
    if not config.backbone_eval and getattr(dropped, "prob", 0.0) > 0.0:
        raise ValueError(
            f"With backbone_eval=False the model drops patches in training, but {method} needs all patches. Set "
            "backbone_eval=True, or create the model with patch_drop_rate=0."
        )
    paths = {id(module): path for path, module in model.named_modules()}
    read = [paths[id(site.patches.embedding)], paths[id(site.patches.owner)]]
    for name in config.modules_to_save or ():
        if any(takes(name, part) for path in read for part in _and_above(path)):
            raise ValueError(
                f"modules_to_save={name!r} would copy the patch embedding, from which {method} reads the grid of an "
                "image. Remove it from modules_to_save."
            )


def _and_above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def refuse_task_type(config: PromptConfig) -> None:
    """Raise ValueError if `task_type` is set for an image model: PEFT's task wrappers are for text models."""
    if config.task_type is not None:
        raise ValueError(
            f"task_type={config.task_type!r} wraps the model in a class of PEFT that is for text models. Leave "
            "task_type unset for vision models: their heads are found without it."
        )


# The task_type with which PEFT trains a model's head, by the end of the model's class name.
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def warn_of_frozen_head(model: Any, config: PromptConfig, sites: list[Site]) -> None:
    """Warn if the model has a head that will be neither trained nor saved.

    There is no warning if `task_type` or `modules_to_save` is set; `modules_to_save=[]` means that this is wanted.
    """
    if config.task_type is not None or config.modules_to_save is not None or running_load() is not None:
        return
    heads = text_heads(model, [site.name for site in sites])
    if not heads:
        return
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    save = f"modules_to_save={heads!r}"
    reads_text = getattr(model, "main_input_name", None) == "input_ids"
    fix = f"task_type={task!r}" if task is not None and reads_text else save
    warnings.warn(
        f"The head of {name} ({', '.join(map(repr, heads))}) stays frozen and is not saved with the adapter. "
        f"Set {fix} in the config to train and save it, or modules_to_save=[] to leave it as it is.",
        stacklevel=6,
    )
