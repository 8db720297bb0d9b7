# SPDX-License-Identifier: Apache-2.0
"""The VAPT tuner."""

from __future__ import annotations

from ..sites import Site
from ..targets import image_targets
from ..tuner import PromptTuner
from .config import VAPTConfig
from .layer import VAPTLayer, VAPTShared, VAPTState, check_grid


class VAPTModel(PromptTuner):
    """Adds prompts that adapt to the image to a vision transformer of transformers or timm (arXiv 2501.18936).

    Args:
        model: the base model, any vision transformer with one patch grid.
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
        if config.task_type is not None:
            raise ValueError(
                f"task_type={config.task_type!r} wraps the model in a class of PEFT that passes text on. Leave "
                "task_type unset for vision models; their heads are found without it."
            )
        if config.num_static_layers != "all" and int(config.num_static_layers) > (deepest := _blocks(sites)):
            raise ValueError(
                f"num_static_layers={config.num_static_layers} is more than the {deepest} blocks up to the last one "
                "with prompts. Choose fewer, or 'all' for static prompts in all of them (VPT-Deep)."
            )
        if config.image_size is None:
            sizes = {site.patches.image_size for site in sites if site.patches is not None}
            if len(sizes) != 1 or None in sizes:
                raise ValueError("The model takes images of any size. Set image_size to that of yours.")
            config.image_size = list(sizes.pop())  # type: ignore[arg-type]

    def check_site(self, config: VAPTConfig, site: Site) -> None:
        if site.patches is None:
            raise ValueError(
                f"{site.name!r} does not attend over one patch grid, from which VAPT makes its prompts: it is no "
                "vision transformer's, or one's of windows or several resolutions (Swin, Hiera, PVT). Use a plain "
                "vision transformer of transformers or timm."
            )
        if not config.is_static(site.index):
            check_grid(config, site.patches.grid(config.image_shape))


def _blocks(sites: list[Site]) -> int:
    return max(site.index for site in sites) + 1
