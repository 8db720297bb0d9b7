# SPDX-License-Identifier: Apache-2.0
"""The ProMotion tuner."""

from __future__ import annotations

from typing import Any

from ..checks import check_has_patches, check_whole_grid, refuse_task_type
from ..models.levels import blocks_in_use
from ..models.sites import Site, find_site
from ..models.targets import image_targets
from ..tuner import PromptTuner
from .config import MAX_UNITS, MAX_VALUES, ProMotionConfig
from .layer import ProMotionLayer, check_count


class ProMotionModel(PromptTuner):
    """ProMotion tuner: adds denoised prototypes behind blocks of a frozen vision transformer, for flow and depth.

    Experimental. This is our reading of ProMotion (arXiv 2406.04999), whose code and equations are not public: an
    adapter, while the paper trains a network. It works with any model that contains a plain vision transformer or a
    Swin of transformers or timm. Its losses reach the optimiser through the `loss` that the model returns.

    Args:
        model: the base model, with one patch grid, or one in each stage (Swin).
        config: a [`ProMotionConfig`].
        adapter_name: name of the adapter.

    Example:

        ```py
        >>> import peft_promptmoe
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForImageClassification

        >>> vit = AutoModelForImageClassification.from_pretrained("facebook/dinov2-small", num_labels=10)
        >>> model = get_peft_model(vit, peft_promptmoe.ProMotionConfig())
        >>> model.print_trainable_parameters()
        ```
    """

    prefix = "promotion_"
    method = "ProMotion"
    tuner_layer_cls = ProMotionLayer
    prompt_layer_cls = ProMotionLayer
    joins_windows = True

    def default_targets(self) -> str | list[str]:
        return image_targets(self.model, windows=True)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.layers_to_transform is None:
            found = self.default_targets()
            peft_config.target_modules = found if isinstance(found, str) else set(found)
            paths = [path for path, _ in self.model.named_modules()]
            paths = [path for path in paths if self._check_target_module_exists(peft_config, path)]
            sites = [find_site(self.model, path, windows=True) for path in paths]
            if sites:
                peft_config.layers_to_transform = blocks_in_use(self.model, sites)
        return super()._prepare_adapter_config(peft_config, model_config)

    def resolve(self, config: ProMotionConfig, sites: list[Site]) -> None:
        refuse_task_type(config)
        if len(sites) > MAX_UNITS:
            raise ValueError(
                f"ProMotion would add units to {len(sites)} blocks; at most {MAX_UNITS} are allowed. Set "
                "layers_to_transform."
            )

    def check_site(self, config: ProMotionConfig, site: Site) -> None:
        check_has_patches(site, self.method)
        assert site.patches is not None
        if site.patches.stage is None:  # else the grid is in the calls of blocks
            check_whole_grid(self.model, config, site, self.method)
        if site.patches.fixed and site.patches.image_size is not None:
            rows, columns = site.patches.grid(site.patches.image_size)
            check_count(config, site, rows * columns, (rows, columns))
        if config.bottleneck_dim * site.width > MAX_VALUES:
            raise ValueError(
                f"bottleneck_dim={config.bottleneck_dim} is too large for width {site.width}: at most {MAX_VALUES} "
                "values are allowed."
            )
