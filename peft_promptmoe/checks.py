# SPDX-License-Identifier: Apache-2.0
"""What every method refuses before the model is touched."""

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
from .sharing.rollback import running_load

# Settings under which all blocks count.
ALL_BLOCKS: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None}


def is_target(config: Any, path: str) -> Any:
    """PEFT's rule, except that `layers_to_transform` counts for regular expressions and whole paths, too."""
    found = check_target_module_exists(config, path)
    asked, targets = config.layers_to_transform, config.target_modules
    if not found or asked is None or not (isinstance(targets, str) or path in targets):
        return found
    return _block(config, path) in _several(asked)


def _block(config: Any, path: str) -> int | None:
    """The number that `layers_to_transform` counts: the first in the path, or the one behind `layers_pattern`."""
    named = config.layers_pattern
    lists = "|".join(f"(?:{name})" for name in ([named] if isinstance(named, str) else named or ()))
    match = re.search(rf"(?:^|\.){f'(?:{lists})' if lists else ''}{r'[.]' if lists else ''}(\d+)(?=\.)", path)
    return int(match.group(1)) if match is not None else None


def _several(layers: Any) -> set[int]:
    return {layers} if isinstance(layers, int) else set(layers)


def no_match(model: nn.Module, config: PromptConfig, chosen: bool) -> str:
    """Why there is nothing to prompt.

    Args:
        chosen: whether `target_modules` was left to us.
    """
    name = type(model).__name__
    free = _paths(model, config, **ALL_BLOCKS)
    if config.layers_to_transform is not None and free:
        if config.layers_pattern and not any(_block(config, path) is not None for path in free):
            return (
                f"layers_pattern={config.layers_pattern!r} names no list of blocks in the paths of {name}'s attention "
                f"layers, such as {free[0]!r}. Leave it unset, or name the module that holds the blocks."
            )
        return _no_such_layer(model, config, _several(config.layers_to_transform), chosen)
    field = left_out_by(model, config)
    if field == "exclude_modules":
        return (
            f"exclude_modules={config.exclude_modules!r} leaves out all attention layers of {name} that prompts would "
            "join. Exclude fewer, or leave exclude_modules unset."
        )
    if field == "modules_to_save":
        return (
            f"modules_to_save={config.modules_to_save!r} holds all attention layers of {name} that prompts would "
            "join, and prompts join none that is copied. Name heads only."
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
            f"and {name} has no such layers. Make a new config for each model."
        )
    return (
        f"target_modules={config.target_modules!r} matches no module of {name}. Leave target_modules unset, or name "
        "attention layers of this model."
    )


def _paths(model: nn.Module, config: PromptConfig, **changed: Any) -> list[str]:
    """The paths that the config would match with some of its settings changed."""
    other = copy.copy(config)
    for name, value in changed.items():
        setattr(other, name, value)
    paths = (path for path, _ in model.named_modules() if path and PROMPT_CHILD not in path.split("."))
    return [path for path in paths if is_target(other, path)]


def left_out_by(model: nn.Module, config: PromptConfig) -> str | None:
    """Which of `exclude_modules` and `modules_to_save` keeps layers from being prompted; None if neither does."""
    matched = _paths(model, config, **ALL_BLOCKS)
    for fields in (["exclude_modules"], ["modules_to_save"], ["exclude_modules", "modules_to_save"]):
        if len(_paths(model, config, **ALL_BLOCKS, **dict.fromkeys(fields))) > len(matched):
            return fields[0]
    return None


def _no_such_layer(model: nn.Module, config: PromptConfig, missing: set[int], chosen: bool) -> str:
    """What to say of numbers in `layers_to_transform` that are those of no prompted layer."""
    there = _numbers(config, _paths(model, config, **ALL_BLOCKS))
    all_there = _numbers(config, _paths(model, config, **ALL_BLOCKS, exclude_modules=None, modules_to_save=None))
    whole = there == list(range(len(there)))
    known = f"{there[0]} to {there[-1]}" if whole and len(there) > 1 else ", ".join(map(str, there)) or "none"
    name = type(model).__name__
    if not missing:
        return (
            f"layers_to_transform={config.layers_to_transform!r} leaves no layer of {name} to prompt. Leave it unset "
            f"for all, or name some of {known}."
        )
    strange = missing - set(all_there)
    subject = f"layers_to_transform names {_named(strange or missing)}"
    if strange:
        may = "that prompts can join" if chosen else f"that target_modules={config.target_modules!r} names"
        return f"{subject}, not among the layers of {name} {may}: {known} (from 0 on).{_used_before(config)}"
    without = _numbers(config, _paths(model, config, **ALL_BLOCKS, exclude_modules=None))
    if missing & set(without):
        return (
            f"layers_to_transform names {_named(missing & set(without))}, which exclude_modules="
            f"{config.exclude_modules!r} leaves out. Take it out of one of the two."
        )
    return (
        f"{subject}, of which modules_to_save={config.modules_to_save!r} makes a copy, and prompts join no copy. Name "
        "heads only in modules_to_save."
    )


def _numbers(config: PromptConfig, paths: list[str]) -> list[int]:
    return sorted({number for path in paths if (number := _block(config, path)) is not None})


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
    """Refuse numbers of layers that there are not, or that other settings leave out.

    Args:
        chosen: whether `target_modules` was left to us.
    """
    asked = config.layers_to_transform
    if asked is None:
        return
    missing = _several(asked) - {_block(config, site.name) for site in sites}
    if missing:
        raise ValueError(_no_such_layer(model, config, missing, chosen))


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
    if hides_patches(site.patches.owner):
        raise ValueError(says_hidden(site.patches.owner))
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


# What to write in a config whose model has a head of its own, by the end of the model's class name; PEFT's wrappers
# for these tasks train the head.
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def warn_of_frozen_head(model: Any, config: PromptConfig, sites: list[Site]) -> None:
    """Say that a head will be neither trained nor saved, where nothing in the config speaks of it.

    `modules_to_save=[]` says that this is meant.
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
