# SPDX-License-Identifier: Apache-2.0
"""The bare encoder in a vision model, and whether prompts can pass through its blocks as tokens."""

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
    """The bare encoder in a model: the innermost of transformers' models that embeds patches and attends, or timm's.

    Raises:
        ValueError: there is none, its weights are not there, or it has an adapter.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"Expert {name!r} has weights on the meta device. Load them before handing it over.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"Expert {name!r} has an adapter in it. Hand over the model without, or merged.")
    check_no_backbone(model, f"Expert {name!r}")
    found = encoder_within(model, _sites(model, name))
    if found is None:
        raise ValueError(
            f"Expert {name!r} is neither a model of transformers nor one of timm. Hand over one of these."
        )
    return found


def check_free(model: nn.Module, name: str, own: Iterable[nn.Module] = ()) -> None:
    """Check that no prompts of another model enter this one.

    Args:
        model: what is to be hooked.
        name: what to call it.
        own: prompt layers that may be hooked to it.

    Raises:
        ValueError: it is an expert of another model.
    """
    allowed = {id(layer) for layer in own}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, PromptLayer) and id(owner) not in allowed:
                raise ValueError(
                    f"{name} is an expert of another model, whose prompts would enter here, too. unload() that model "
                    "first, or use one that is loaded anew (a deep copy would be hooked as well)."
                )


def check_no_backbone(model: nn.Module, name: str) -> None:
    """Raise ValueError for models that hand out their blocks' inputs, among which prompts would be."""
    if any(isinstance(module, BackboneMixin) for module in model.modules()):
        raise ValueError(
            f"{name} is, or holds, a backbone of transformers, which hands out what goes into its blocks, and prompts "
            "are part of that. Use the plain model (Dinov2Model for Dinov2Backbone), with patch_maps for dense heads."
        )


def encoder_within(model: nn.Module, sites: Sequence[Site]) -> nn.Module | None:
    """As `find_encoder`, by the tower's attention layers; None where no model of either library holds them all."""
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
        name: of the model, for the message.

    Raises:
        ValueError: the tower has several grids or widths, not one attention layer per block, or positions that tokens
            without a place in the image do not have.
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
            f"{name!r} adds relative position biases to its attention, and prompts as tokens have none. {USE}"
        )
    if any(_is_rotary(site) for site in sites):
        raise ValueError(
            f"{name!r} turns all tokens behind its prefix by rotary positions, so prompts cannot pass through it as "
            f"tokens. {USE}"
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
    """Whether the tower turns tokens by their place in the row; DINOv3 of transformers counts patches from the end."""
    if site.patches is None:
        return False
    if site.is_timm:
        return any("rotary" in type(module).__name__.lower() for module in site.patches.owner.modules())
    config = getattr(site.attention, "config", None)
    return site.family is None and any(hasattr(config, name) for name in ("rope_theta", "rope_parameters"))
