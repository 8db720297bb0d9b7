# SPDX-License-Identifier: Apache-2.0
"""Configuration of VAPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..config import VirtualTokensConfig, check_bool, check_choice, check_int, check_number
from ..field_types import ImageSize, StaticLayers
from ..registration import ensure_peft_type

MAX_PIXELS = 16_384  # side of an image; more is a mistake, or an attempt to exhaust memory
MAX_WIDTH = 65_536
MAX_VALUES = 4_194_304  # of one trained tensor, 16 MiB
MAX_MAPS = 2**28  # values of channelwise kernels spread over the grid, 1 GiB
Activation = Literal["relu", "gelu", "sigmoid", "softmax", "identity"]


@dataclass
class VAPTConfig(VirtualTokensConfig):
    """Configuration of VAPT: every block gets prompts computed from the image (arXiv 2501.18936).

    Letters: `Np` prompts per layer, `D` width, `L` blocks, `v` static blocks, `H x W` patch grid, `K` kernel side,
    `H' = H + 2 * padding - K + 1`, `W'` likewise, `r` bottleneck width. An adapter trains, without its head,
    v * Np * D + (L - v) * (Np * (H' * W' + 1) + K^2 + 2 * D) + 2 * r * D values.

    Where the paper and the official code differ, the default is that of the code. Each such field says so. Leave
    `task_type` unset: PEFT's task wrappers are for text models.

    Args:
        num_virtual_tokens: prompts per layer, Np.
        bottleneck_dim: width r of the feature projector (official code: 8).
        kernel_size: side K of the convolution over the patch grid, in patches (official code: 2).
        padding: zero padding of the convolution on every side, in patches (official code: 0).
        use_conv: whether there is a convolution. Without it the token-wise projector reads the patches directly, and
            there is no channel dropout (an option of the official code).
        channelwise_kernel: whether every channel has its own kernel, K^2 * D values per layer. False is the method:
            all channels share one kernel (paper and official code). Careful: the official option with nearly the same
            name means the opposite.
        use_projector: whether prompts pass through the residual feature projector (an option of the official code).
            The paper has no residual connection; without it a projector that starts at zero could not learn.
        share_projector: whether all layers share one feature projector (paper and official code: yes).
        learnable_scale: whether a trained number, initially 1, multiplies the projector's output before it is added
            (an option of the official code).
        projector_scale: factor from the trained tensors to the projector's matrices. With Adam it multiplies their
            learning rate and leaves their initial values unchanged: the default 25 turns an ordinary 1e-3 into the
            2.5e-2 that they need. Use 1 for the official code's setting, which trains with SGD.
        activation: activation of the projector: "relu" (official code), "gelu", "sigmoid", "softmax" (the official
            code calls it "attention") or "identity".
        num_static_layers: number of first blocks with static prompts (official code: 1; the paper's parameter count
            assumes 0). "all" is VPT-Deep (arXiv 2203.12119).
        prompt_dropout: dropout probability of static prompts (official code: none for prompts made from the image).
        channel_dropout: probability of dropping a whole channel of the convolution's output (official code: 0.1).
        projector_dropout: dropout probability after the projector's activation (official code: 0.1).
        image_size: size of the images in pixels: one side, or (rows, columns). The patch grid of this size decides the
            shape of the token-wise projector. Unset: the model's own size. Set it if the model takes any size and your
            images have another: DINOv2 declares 518 and is mostly used with 224.
        resample_grid: whether images with another patch grid are accepted. The projector's weights are then resampled
            bilinearly over the grid, and their sum is kept. Otherwise such images are refused.
        backbone_eval: whether the frozen base model stays in evaluation mode while the adapter trains, which turns off
            its dropout and stochastic depth (official code: yes).
        target_modules, exclude_modules: attention layers to prompt and to leave out, as in PEFT: names or a regular
            expression. Unset: chosen by the model's architecture.
        layers_to_transform: numbers of the blocks to prompt, counted from 0: a list or one number. Unset: all blocks.
        layers_pattern: name of the module list in which `layers_to_transform` counts.
        modules_to_save: other modules to train and save with the adapter, usually a head. Unset: the head of an image
            model is found. `[]`: none.
        trainable_token_indices: tokens whose embeddings are trained and saved, as in PEFT. For text models only.
        init_weights: False for large random values (for tests).
        check_base_weights: whether to warn when the adapter is loaded onto a base model with other weights.
        base_record: description of the base model the adapter was made for. Filled in automatically.
        task_type: leave it unset. PEFT's task wrappers are for text models.
        inference_mode, base_model_name_or_path, revision, peft_type, auto_mapping, peft_version: as in every PEFT
            config. PEFT fills them in.
    """

    bottleneck_dim: int = field(default=8, metadata={"help": "Width r of the feature projector."})
    kernel_size: int = field(
        default=2, metadata={"help": "Side K of the convolution over the patch grid, in patches."}
    )
    padding: int = field(default=0, metadata={"help": "Zero padding of the convolution, in patches."})
    use_conv: bool = field(default=True, metadata={"help": "Whether a convolution reads the patches first."})
    channelwise_kernel: bool = field(default=False, metadata={"help": "Whether every channel has its own kernel."})
    use_projector: bool = field(default=True, metadata={"help": "Whether prompts pass through the feature projector."})
    share_projector: bool = field(default=True, metadata={"help": "Whether all layers share one feature projector."})
    learnable_scale: bool = field(
        default=False, metadata={"help": "Whether a trained number scales the projector's output."}
    )
    projector_scale: float = field(
        default=25.0, metadata={"help": "Projector matrices = projector_scale * the trained tensors."}
    )
    activation: Activation = field(default="relu", metadata={"help": "Activation of the feature projector."})
    num_static_layers: StaticLayers = field(
        default=1, metadata={"help": "Number of first blocks with static prompts. 'all': VPT-Deep."}
    )
    prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of static prompts."})
    channel_dropout: float = field(
        default=0.1, metadata={"help": "Dropout probability of the convolution's channels."}
    )
    projector_dropout: float = field(
        default=0.1, metadata={"help": "Dropout probability after the projector's activation."}
    )
    image_size: ImageSize = field(
        default=None, metadata={"help": "Image size in pixels: a side or [rows, columns]. Unset: the model's."}
    )
    resample_grid: bool = field(
        default=True, metadata={"help": "Whether images with another patch grid are accepted."}
    )
    backbone_eval: bool = field(  # type: ignore[misc]
        default=True, metadata={"help": "Whether the frozen base model stays in evaluation mode in training."}
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
                "learnable_scale=True has no effect with use_projector=False: there is no projector to scale. Set "
                "use_projector=True or learnable_scale=False."
            )

    def _check_image_size(self) -> None:
        if self.image_size is None:
            return
        sides = self.image_size if isinstance(self.image_size, (list, tuple)) else [self.image_size] * 2
        if len(sides) != 2:
            raise ValueError(f"image_size must be one side or (rows, columns) in pixels, got {self.image_size!r}.")
        for side in sides:
            check_int("image_size", side, 1, MAX_PIXELS)
        self.image_size = list(sides)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Image size in pixels, (rows, columns). Known once the config was used with a model."""
        assert isinstance(self.image_size, list)
        return self.image_size[0], self.image_size[1]

    def is_static(self, block: int) -> bool:
        """Whether the prompts of a block, counted from 0, are static."""
        return self.num_static_layers == "all" or block < int(self.num_static_layers)

    def reduced(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(H', W'): rows and columns of the convolution's output for a patch grid."""
        if not self.use_conv:
            return grid
        shrink = self.kernel_size - 1 - 2 * self.padding
        return grid[0] - shrink, grid[1] - shrink
