# SPDX-License-Identifier: Apache-2.0
"""Finds the encoder in a vision model, and checks that prompts can pass through its blocks as tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from ...engine.prompt_layer import PromptLayer
from ...models.sites import Site, find_site
from ...models.targets import image_targets

RELATIVE = ("relative_position_bias", "rel_pos_bias", "rel_pos", "shared_rel_pos", "relative_position_bias_table")
USE = "Use a plain vision transformer (ViT, DeiT, DINO, DINOv2, MAE, the vision tower of CLIP or SigLIP)."


def find_encoder(model: nn.Module, name: str) -> nn.Module:
    """Find the encoder in a model: the innermost transformers model with patch embedding and attention, or timm's.

    Raises:
        ValueError: there is none, its weights are on the meta device, or it has an adapter.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"Expert {name!r} has weights on the meta device. Load them before you pass the model.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"Expert {name!r} contains an adapter. Pass the model without the adapter, or with it merged."
        )
    check_no_backbone(model, f"Expert {name!r}")
    found = encoder_within(model, _sites(model, name))
    if found is None:
        raise ValueError(f"Expert {name!r} is neither a model of transformers nor of timm. Pass one of these.")
    return found


def check_free(model: nn.Module, name: str, own: Iterable[nn.Module] = ()) -> None:
    """Check that no prompts of another model enter this one.

    Args:
        model: the model that will get hooks.
        name: its name in messages.
        own: prompt layers that may already be hooked to it.

    Raises:
        ValueError: the model is an expert of another model.
    """
    allowed = {id(layer) for layer in own}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, PromptLayer) and id(owner) not in allowed:
                raise ValueError(
                    f"{name} is an expert of another model, and its prompts would enter here, too. unload() that "
                    "model first, or load this one again (a deep copy keeps the hooks)."
                )


def check_no_backbone(model: nn.Module, name: str) -> None:
    """Raise ValueError for models that return the inputs of their blocks: they would contain prompts."""
    if any(isinstance(module, BackboneMixin) for module in model.modules()):
        raise ValueError(
            f"{name} is, or contains, a backbone of transformers. It returns the inputs of its blocks, which would "
            "contain prompts. Use the plain model (Dinov2Model for Dinov2Backbone), with patch_maps for dense heads."
        )


def encoder_within(model: nn.Module, sites: Sequence[Site]) -> nn.Module | None:
    """Find the encoder that contains all attention layers of a tower. None if there is none."""
    wrapped = getattr(model, "timm_model", model)
    if hasattr(wrapped, "forward_features"):
        return wrapped
    first = sites[0].patches
    assert first is not None
    wanted = {id(first.embedding), *(id(site.attention) for site in sites)}
    found = None
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and wanted <= {id(part) for part in module.modules()}:
            found = module
    return found


def find_tower(encoder: nn.Module, name: str) -> list[Site]:
    """The attention layers of an encoder in the order of its blocks.

    Raises:
        ValueError: it is no plain vision transformer.
    """
    sites = sorted(_sites(encoder, name), key=lambda site: site.index)
    check_tower(sites, name)
    return sites


def _sites(model: nn.Module, name: str) -> list[Site]:
    try:
        targets = image_targets(model)
        if isinstance(targets, str):
            targets = [path for path, _ in model.named_modules() if re.fullmatch(targets, path)]
        sites = [find_site(model, path) for path in targets]
    except ValueError as error:
        raise ValueError(f"Expert {name!r} cannot take prompts: {error}") from error
    if not sites or any(site.patches is None for site in sites):
        raise ValueError(f"Expert {name!r} has layers that do not attend over one patch grid. {USE}")
    return sites


def check_tower(sites: list[Site], name: str) -> None:
    """Check that prompts can pass through every block of a tower as tokens.

    Args:
        sites: its attention layers.
        name: name of the model, for the message.

    Raises:
        ValueError: the tower has several patch grids or widths, not exactly one attention layer per block, or
            positions (relative biases, rotary embeddings) that prompt tokens cannot have.
    """
    if not sites or any(site.patches is None for site in sites):
        raise ValueError(f"{name!r} has layers that do not attend over one patch grid. {USE}")
    if len({id(site.patches.embedding) for site in sites if site.patches is not None}) > 1:
        raise ValueError(f"{name!r} has several patch grids. {USE}")
    if len({site.width for site in sites}) > 1:
        raise ValueError(f"{name!r} has blocks of several widths. {USE}")
    if sorted(site.index for site in sites) != list(range(len(sites))):
        raise ValueError(f"{name!r} does not have one attention layer in each of its blocks. {USE}")
    if any(_is_relative(site) for site in sites):
        raise ValueError(
            f"{name!r} adds relative position biases to its attention, but prompt tokens have none. {USE}"
        )
    if any(_is_rotary(site) for site in sites):
        raise ValueError(
            f"{name!r} applies rotary embeddings to all tokens after its prefix, so prompts cannot pass through it "
            f"as tokens. {USE}"
        )


def _is_relative(site: Site) -> bool:
    config = getattr(site.attention, "config", None)
    settings = ("use_relative_position_bias", "use_shared_relative_position_bias")
    if any(getattr(config, setting, False) for setting in settings):
        return True
    owner = site.patches.owner if site.patches is not None else site.block
    modules = [owner, *site.block.modules()]
    return any(getattr(module, attribute, None) is not None for module in modules for attribute in RELATIVE)


def _is_rotary(site: Site) -> bool:
    """Whether the tower applies rotary embeddings by token index. (transformers' DINOv3 counts from the end.)"""
    if site.patches is None:
        return False
    if site.is_timm:
        return any("rotary" in type(module).__name__.lower() for module in site.patches.owner.modules())
    config = getattr(site.attention, "config", None)
    return site.family is None and any(hasattr(config, name) for name in ("rope_theta", "rope_parameters"))
