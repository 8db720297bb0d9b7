# SPDX-License-Identifier: Apache-2.0
"""Configuration of VAPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..config import VirtualTokensConfig, check_bool, check_choice, check_int, check_number
from ..field_types import ImageSize, StaticLayers
from ..registration import ensure_peft_type

MAX_PIXELS = 16_384  # a side of an image; more is a mistake, or a stranger's config asking for memory
MAX_WIDTH = 65_536
MAX_VALUES = 4_194_304  # of one trained tensor, 16 MiB
MAX_MAPS = 2**28  # values of what kernels of their own spread over the grid, 1 GiB
Activation = Literal["relu", "gelu", "sigmoid", "softmax", "identity"]


@dataclass
class VAPTConfig(VirtualTokensConfig):
    """Configuration of VAPT: in every block, prompts made from the image (arXiv 2501.18936).

    Letters: `Np` prompts per layer, `D` width, `L` blocks, `v` static ones, `H x W` patch grid, `K` kernel side,
    `H' = H + 2 * padding - K + 1`, `W'` likewise, `r` bottleneck width. An adapter trains, heads aside,
    v * Np * D + (L - v) * (Np * (H' * W' + 1) + K^2 + 2 * D) + 2 * r * D values.

    Where the paper and the official code differ, the defaults are the code's; each such field says so. Leave
    `task_type` unset: PEFT's task wrappers are for text.

    Args:
        bottleneck_dim: width r of the feature projector (official code: 8).
        kernel_size: side K of the convolution over the patch grid (official code: 2).
        padding: zero padding of the convolution on every side (official code: 0).
        use_conv: whether there is a convolution; without it the token-wise projector reads the patches themselves and
            there is no channel dropout (official code's option).
        channelwise_kernel: whether every channel has a kernel of its own, K^2 * D values per layer; False is the
            method: one kernel tied over the channels (paper and official code, whose option of nearly this name means
            the opposite).
        use_projector: whether prompts pass through the residual feature projector (official code's option; the paper
            has no residual, without which the zero start could not learn).
        share_projector: whether all layers share one feature projector (paper and official code); otherwise each has
            its own.
        learnable_scale: whether a learned number, at first 1, multiplies the projector's output before it is added
            (official code's option).
        projector_scale: the projector's matrices are this times the trained tensors, which under Adam multiplies their
            learning rate and does not change their start. They want about 2.5e-2, which the default makes of an
            ordinary 1e-3; 1 is the official code, which trains with SGD.
        activation: of the projector: "relu" (official code), "gelu", "sigmoid", "softmax" (the code's "attention") or
            "identity".
        num_static_layers: how many of the model's first blocks have static prompts (official code: 1; the paper's
            count has 0); "all" is VPT-Deep (arXiv 2203.12119).
        prompt_dropout: dropout of static prompts (official code: adaptive ones have none).
        channel_dropout: probability of dropping a whole channel of the convolution's output (official code: 0.1).
        projector_dropout: dropout behind the projector's activation (official code: 0.1).
        image_size: pixels of the images, a side or (rows, columns), whose patch grid decides the shape of the
            token-wise projector. Unset, it is the model's own. Set it where the model takes any size and yours is
            another: DINOv2 says 518 and mostly gets 224.
        resample_grid: whether the projector's weights are resampled when images of another patch grid come (bilinear
            on the grid, their sum kept); otherwise such images are refused.
        backbone_eval: whether the frozen model stays in evaluation mode while the adapter trains, so that its dropout
            and stochastic depth are off (official code: yes).
        num_virtual_tokens: prompts per layer, Np.
        target_modules, exclude_modules: attention layers to prompt and to leave out, as in PEFT: names or a regular
            expression. Unset, they follow from the architecture.
        layers_to_transform, layers_pattern: numbers of the blocks to prompt, from 0 on, a list or one, and the name of
            the module list that they count in; unset, all blocks.
        modules_to_save: modules to train and save besides, usually a head. Image heads are found without it; `[]`
            leaves them out.
        trainable_token_indices: tokens whose embeddings train and are saved, as in PEFT; for models that read text.
        init_weights: False for large random values (tests).
        check_base_weights: whether to warn when the adapter is loaded onto other base weights.
        base_record: what the base model was when the adapter was made; filled in by then.
        task_type: leave it unset: PEFT's task wrappers are for text.
        inference_mode, base_model_name_or_path, revision, peft_type, auto_mapping, peft_version: as in every PEFT
            config; PEFT fills them in.
    """

    bottleneck_dim: int = field(default=8, metadata={"help": "Width r of the feature projector."})
    kernel_size: int = field(default=2, metadata={"help": "Side K of the convolution over the patch grid."})
    padding: int = field(default=0, metadata={"help": "Zero padding of the convolution."})
    use_conv: bool = field(default=True, metadata={"help": "Whether there is a convolution."})
    channelwise_kernel: bool = field(default=False, metadata={"help": "Whether every channel has its own kernel."})
    use_projector: bool = field(default=True, metadata={"help": "Whether there is a feature projector."})
    share_projector: bool = field(default=True, metadata={"help": "Whether all layers share one feature projector."})
    learnable_scale: bool = field(default=False, metadata={"help": "Whether a learned number scales the projector."})
    projector_scale: float = field(
        default=25.0, metadata={"help": "The projector's matrices are this times the trained tensors."}
    )
    activation: Activation = field(default="relu", metadata={"help": "Activation of the feature projector."})
    num_static_layers: StaticLayers = field(
        default=1, metadata={"help": "Number of first blocks with static prompts, or 'all' for VPT-Deep."}
    )
    prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout of static prompts."})
    channel_dropout: float = field(default=0.1, metadata={"help": "Dropout of channels behind the convolution."})
    projector_dropout: float = field(default=0.1, metadata={"help": "Dropout behind the projector's activation."})
    image_size: ImageSize = field(
        default=None, metadata={"help": "Pixels of the images, a side or [rows, columns]; unset, the model's own."}
    )
    resample_grid: bool = field(default=True, metadata={"help": "Whether other patch grids are resampled for."})
    backbone_eval: bool = field(  # type: ignore[misc]
        default=True, metadata={"help": "Whether the frozen model stays in evaluation mode."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type("VAPT")
        check_int("bottleneck_dim", self.bottleneck_dim, 1, MAX_WIDTH)
        check_int("kernel_size", self.kernel_size, 1, MAX_PIXELS)
        check_int("padding", self.padding, 0, MAX_PIXELS)
        for name in ("use_conv", "channelwise_kernel", "use_projector", "share_projector", "learnable_scale"):
            check_bool(name, getattr(self, name))
        check_number("projector_scale", self.projector_scale, 0.0, open_low=True)
        check_bool("resample_grid", self.resample_grid)
        check_bool("backbone_eval", self.backbone_eval)
        check_choice("activation", self.activation, Activation)
        if isinstance(self.num_static_layers, str):
            check_choice("num_static_layers", self.num_static_layers, ("all",))
        else:
            check_int("num_static_layers", self.num_static_layers, 0)
        for name in ("prompt_dropout", "channel_dropout", "projector_dropout"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        self._check_image_size()
        if self.learnable_scale and not self.use_projector:
            raise ValueError(
                "learnable_scale=True scales the feature projector, and use_projector=False leaves it out."
            )

    def _check_image_size(self) -> None:
        if self.image_size is None:
            return
        sides = self.image_size if isinstance(self.image_size, (list, tuple)) else [self.image_size] * 2
        if len(sides) != 2:
            raise ValueError(f"image_size must be a side or (rows, columns), got {self.image_size!r}.")
        for side in sides:
            check_int("image_size", side, 1, MAX_PIXELS)
        self.image_size = list(sides)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(rows, columns) of pixels, once they are resolved."""
        assert isinstance(self.image_size, list)
        return self.image_size[0], self.image_size[1]

    def is_static(self, block: int) -> bool:
        """Whether the prompts of a block, counted from 0, are static."""
        return self.num_static_layers == "all" or block < int(self.num_static_layers)

    def reduced(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(H', W'): rows and columns that the convolution makes of a patch grid."""
        if not self.use_conv:
            return grid
        shrink = self.kernel_size - 1 - 2 * self.padding
        return grid[0] - shrink, grid[1] - shrink
