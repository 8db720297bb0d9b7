# SPDX-License-Identifier: Apache-2.0
"""The pMoE tuner."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from ..adapter_state import PROMPT_CHILD, AdapterState
from ..checks import left_out_by, refuse_task_type
from ..engine.prompt_layer import PromptLayer
from ..models.heads import vision_heads
from ..models.sites import Site, find_site
from ..models.targets import image_targets
from ..tuner import PromptTuner
from .config import PMoEConfig
from .experts.gather import Expert, freeze, gather_experts
from .experts.records import pixels_of
from .experts.towers import check_free, check_no_backbone, check_tower, encoder_within
from .fusion import Fusion
from .layer import PMoELayer
from .shared import HooksOnBase, PMoEShared, classifier


class PMoEModel(PromptTuner):
    """pMoE tuner: combines an image model with further frozen backbones (our reading of arXiv 2602.22938).

    Args:
        model: the base model: a vision transformer of transformers or timm with one classifier. An encoder without
            classifier is enough if only `patch_maps` is used.
        config: a [`PMoEConfig`].
        adapter_name: name of the adapter.

    Example:

        ```py
        >>> import peft_promptmoe
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForImageClassification

        >>> vit = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=10)
        >>> experts = ["facebook/dino-vitb16", "timm/vit_base_patch16_224.mae"]
        >>> model = get_peft_model(vit, peft_promptmoe.PMoEConfig(experts=experts))
        >>> print(peft_promptmoe.parameter_report(model))
        ```
    """

    prefix = "pmoe_"
    method = "pMoE"
    tuner_layer_cls = AdapterState
    prompt_layer_cls = PMoELayer
    shared_layer_cls = PMoEShared

    def default_targets(self) -> str | list[str]:
        return image_targets(self.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Like `PromptTuner.inject_adapter`. The further experts are loaded before the model is changed."""
        if (fusion := self._fusion()) is not None:
            fusion.shut()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            if (fusion := self._fusion()) is not None:
                fusion.open()

    def _fusion(self) -> HooksOnBase | None:
        shared = self._shared()
        return shared.fusion if shared is not None else None

    def _shared(self) -> PMoEShared | None:
        hooks: Any = getattr(self.model, PROMPT_CHILD, None)
        held = getattr(hooks, "shared", {})
        return held[self.method] if self.method in held else None  # noqa: SIM401  a ModuleDict has no get

    def resolve(self, config: PMoEConfig, sites: list[Site]) -> None:
        refuse_task_type(config)
        config.check_experts()
        tower, name = self._tower(), type(self.model).__name__
        check_no_backbone(self.model, name)
        check_free(self.model, name, own=[m for m in self.model.modules() if isinstance(m, PromptLayer)])
        check_tower(tower, name)
        self._check_blocks(config, sites, tower)
        shared = self._shared()
        experts = gather_experts(
            config.experts,
            config.expert_records if config.stored else None,
            stored=config.stored,
            download=config.download_experts,
            known=shared.experts if shared is not None else {},
            base=self.model,
        )
        if config.layers_to_transform is not None:
            _check_depths(experts, len(tower))
        _check_channels(experts, tower[0])
        head = self._classifier(tower, bool(experts))
        if config.fusion == "mean" and experts:
            self._check_mean(experts, head)
        if config.image_mean is None:
            config.image_mean, config.image_std = pixels_of(self.model)
        _warn_of_pixels(config, experts)
        config.expert_records = [expert.record.to_dict() for expert in experts]
        self._arrival = (head, len(tower), experts)

    def prepare_shared(self, shared: Any, adapter_name: str) -> None:
        head, depth, experts = self._arrival
        for expert in experts:
            freeze(expert.module)
        shared.welcome(self.model, head, depth, experts)
        shared.fusion = shared.fusion or Fusion(shared)

    def _tower(self) -> list[Site]:
        """All attention layers of the base model's tower, with or without prompts."""
        targets = image_targets(self.model)
        if isinstance(targets, str):
            targets = [path for path, _ in self.model.named_modules() if re.fullmatch(targets, path)]
        return [find_site(self.model, path) for path in targets]

    def _check_blocks(self, config: PMoEConfig, sites: list[Site], tower: list[Site]) -> None:
        found, everything = {site.name for site in sites}, {site.name for site in tower}
        if found - everything:
            raise ValueError(
                f"target_modules matches {sorted(found - everything)[0]!r}, which is not an attention layer of the "
                "image tower. Leave target_modules unset."
            )
        if config.layers_to_transform is None and found != everything:
            field = left_out_by(self.model, config) or "target_modules"
            raise ValueError(
                f"pMoE aligns its experts' blocks by depth, but {field}={getattr(config, field)!r} leaves out some "
                f"of the base model's blocks. Remove them from {field}, and choose blocks with layers_to_transform."
            )

    def _classifier(self, tower: list[Site], experts: bool) -> str | None:
        """Path of the base model's linear classifier. None for an encoder without classifier.

        Raises:
            ValueError: there are several classifiers, or there are further experts and no linear classifier.
        """
        assert tower[0].patches is not None
        heads = vision_heads(self.model, tower[0].patches)
        found = [name for name in heads if isinstance(classifier(self.model, name), nn.Linear)]
        bare = encoder_within(self.model, tower) in (self.model, getattr(self.model, "timm_model", None))
        if experts and not found and (heads or not bare):
            raise ValueError(
                f"pMoE needs a linear classifier for the experts' features, and none was found in "
                f"{type(self.model).__name__} (nn.Linear, as in transformers and timm). Use a model with one, or an "
                "encoder without classifier and your own head on patch_maps."
            )
        if len(found) > 1:
            raise ValueError(
                f"{type(self.model).__name__} has several classifiers ({', '.join(found)}), but the experts' features "
                "can join only one. Use a model with one classifier."
            )
        return found[0] if found else None

    def _check_mean(self, experts: list[Expert], head: str | None) -> None:
        if head is None:
            raise ValueError(
                "fusion='mean' needs a classifier, and the base model has none. Use a model with a classifier."
            )
        width = classifier(self.model, head).in_features
        other = [expert for expert in experts if expert.record.width != width]
        if other:
            raise ValueError(
                f"fusion='mean' needs features of one width: the base model's classifier reads {width} values, but "
                f"{other[0].record.name!r} returns {other[0].record.width}. Use fusion='concat'."
            )


def _check_channels(experts: list[Expert], site: Site) -> None:
    assert site.patches is not None
    channels = site.patches.embedding.in_channels
    for expert in experts:
        patches = expert.sites[0].patches
        if patches is not None and patches.embedding.in_channels != channels:
            raise ValueError(
                f"Expert {expert.record.name!r} reads images of {patches.embedding.in_channels} channels, but the "
                f"base model reads {channels}. Use an expert that reads the same images."
            )


def _warn_of_pixels(config: PMoEConfig, experts: list[Expert]) -> None:
    unknown = [expert.record.name for expert in experts if expert.record.mean is None]
    if experts and (unknown or config.image_mean is None):
        which = f"of {', '.join(unknown)}" if config.image_mean is not None else "of the incoming pixels"
        warnings.warn(
            f"The normalisation {which} is not known, so pixels are passed on unchanged. If the experts need another "
            "normalisation, set image_mean and image_std, and use experts with an image processor or timm data "
            "config.",
            stacklevel=2,
        )


def _check_depths(experts: list[Expert], depth: int) -> None:
    for expert in experts:
        if expert.record.depth != depth:
            raise ValueError(
                f"layers_to_transform counts blocks, but {expert.record.name!r} has {expert.record.depth} of them "
                f"and the base model {depth}. Leave layers_to_transform unset."
            )
