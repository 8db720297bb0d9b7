# SPDX-License-Identifier: Apache-2.0
"""The VAPT tuner."""

from __future__ import annotations

from ..checks import check_has_patches, check_whole_grid, refuse_task_type
from ..models.sites import Site
from ..models.targets import image_targets
from ..tuner import PromptTuner
from .config import VAPTConfig
from .layer import VAPTLayer, VAPTShared, VAPTState, check_grid


class VAPTModel(PromptTuner):
    """VAPT tuner: adds prompts made from the image to a vision transformer (arXiv 2501.18936).

    Args:
        model: the base model: a vision transformer of transformers or timm with one patch grid.
        config: a [`VAPTConfig`].
        adapter_name: name of the adapter.

    Example:

        ```py
        >>> import peft_promptmoe
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForImageClassification

        >>> vit = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=10)
        >>> model = get_peft_model(vit, peft_promptmoe.VAPTConfig())
        >>> model.print_trainable_parameters()
        ```
    """

    prefix = "vapt_"
    method = "VAPT"
    tuner_layer_cls = VAPTState
    prompt_layer_cls = VAPTLayer
    shared_layer_cls = VAPTShared

    def default_targets(self) -> str | list[str]:
        return image_targets(self.model)

    def resolve(self, config: VAPTConfig, sites: list[Site]) -> None:
        refuse_task_type(config)
        if config.num_static_layers != "all" and int(config.num_static_layers) > (deepest := _blocks(sites)):
            raise ValueError(
                f"num_static_layers={config.num_static_layers} is more than the {deepest} blocks up to the last one "
                "with prompts. Choose fewer, or 'all' for static prompts in all of them (VPT-Deep)."
            )
        adaptive = [site for site in sites if not config.is_static(site.index)]
        if config.share_projector and len({site.width for site in adaptive}) > 1:
            raise ValueError(
                "share_projector=True shares one projector among layers of different widths. Set "
                "share_projector=False, or name the layers of one tower in target_modules."
            )
        if config.image_size is None and adaptive:
            sizes = {site.patches.image_size for site in adaptive if site.patches is not None}
            if not sizes:
                return  # `check_site` reports the error
            if None in sizes:
                raise ValueError("The model takes images of any size. Set image_size to the size of your images.")
            if len(sizes) > 1:
                raise ValueError(
                    "The model's towers take images of different sizes. Set image_size to the size of your images."
                )
            config.image_size = next(list(size) for size in sizes if size is not None)

    def check_site(self, config: VAPTConfig, site: Site) -> None:
        check_has_patches(site, self.method)
        if config.is_static(site.index):
            return
        assert site.patches is not None
        check_grid(config, site.patches.grid(config.image_shape), site.width)
        check_whole_grid(self.model, config, site, self.method)


def _blocks(sites: list[Site]) -> int:
    return max(site.index for site in sites) + 1
