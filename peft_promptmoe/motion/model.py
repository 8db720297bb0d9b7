# SPDX-License-Identifier: Apache-2.0
"""Models of motion and depth over any vision backbone, as the stock Trainer and PEFT want them."""

from __future__ import annotations

from torch import Tensor

from .base import MotionBase, MotionOutput


class FlowModel(MotionBase):
    """Optical flow over any vision backbone.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_promptmoe import FlowModel, VAPTConfig
        >>> from transformers import AutoBackbone

        >>> backbone = AutoBackbone.from_pretrained(
        ...     "facebook/dinov2-small", num_hidden_layers=6, out_indices=[4, 5, 6]
        ... )
        >>> model = FlowModel(backbone)
        >>> model = get_peft_model(model, VAPTConfig(modules_to_save=model.head_names))
        >>> output = model(pixel_values=frames, next_pixel_values=next_frames, flow_labels=flow)
        ```

    It is a class of its own because the Trainer takes every forward argument with "label" in its name for a label, and
    reports `eval_loss` and metrics only where all of them are in the batch.
    """

    tasks = ("flow",)

    def forward(
        self,
        pixel_values: Tensor,
        next_pixel_values: Tensor | None = None,
        flow_labels: Tensor | None = None,
        flow_mask: Tensor | None = None,
    ) -> MotionOutput:
        """Flow from one frame to the next.

        Args:
            pixel_values: (B, channels, rows, columns) first frames, normalised for the backbone; any size.
            next_pixel_values: second frames, of the same shape.
            flow_labels: (B, 2, H, W) true flow in pixels of its own size, x first, NaN where unknown. Predictions are
                resized to this size, their values with it.
            flow_mask: (B, H, W), true where the flow counts in the loss.

        Returns:
            Flow of the labels' size, or without labels of the images', and the loss.
        """
        if next_pixel_values is None:
            raise ValueError("Flow is between two frames: give next_pixel_values, of the shape of pixel_values.")
        return self._run(pixel_values, next_pixel_values, flow_labels=flow_labels, flow_mask=flow_mask)


class DepthModel(MotionBase):
    """Depth of single images, from any vision backbone, or from DPT, Depth Anything or GLPN with their own decoder.

    Example:

        ```py
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_promptmoe import DepthModel
        >>> from transformers import AutoModelForDepthEstimation

        >>> base = AutoModelForDepthEstimation.from_pretrained("depth-anything/Depth-Anything-V2-Small-hf")
        >>> model = DepthModel(base)
        >>> config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=model.head_names)
        >>> model = get_peft_model(model, config)
        >>> output = model(pixel_values=images, depth_labels=depth)
        ```
    """

    tasks = ("depth",)

    def forward(
        self, pixel_values: Tensor, depth_labels: Tensor | None = None, depth_mask: Tensor | None = None
    ) -> MotionOutput:
        """Depth of images.

        Args:
            pixel_values: (B, channels, rows, columns), normalised for the backbone; any size.
            depth_labels: (B, H, W) true depth; 0 or NaN where unknown. Predictions are resized to this size.
            depth_mask: (B, H, W), true where the depth counts in the loss.

        Returns:
            Depth of the labels' size, or without labels of the images', and the loss.
        """
        return self._run(pixel_values, None, depth_labels=depth_labels, depth_mask=depth_mask)


class MotionModel(MotionBase):
    """Flow and depth at once, from one pass of the backbone over both frames.

    A batch may lack the labels of one task, whose loss is left out then; all processes of a distributed run have to
    lack it alike. The Trainer reports `eval_loss` for such batches if `TrainingArguments.label_names` names the labels
    they have.
    """

    tasks = ("flow", "depth")

    def forward(
        self,
        pixel_values: Tensor,
        next_pixel_values: Tensor | None = None,
        flow_labels: Tensor | None = None,
        depth_labels: Tensor | None = None,
        flow_mask: Tensor | None = None,
        depth_mask: Tensor | None = None,
    ) -> MotionOutput:
        """Flow from one frame to the next, and depth of the first.

        Args:
            pixel_values: (B, channels, rows, columns) first frames, normalised for the backbone; any size.
            next_pixel_values: second frames, of the same shape; without them there is no flow.
            flow_labels: as [`FlowModel.forward`].
            depth_labels: (B, H, W) true depth of the first frames, as [`DepthModel.forward`].
            flow_mask: (B, H, W).
            depth_mask: (B, H, W).

        Returns:
            Flow and depth, and the weighted sum of the losses there are labels for.
        """
        return self._run(pixel_values, next_pixel_values, flow_labels, depth_labels, flow_mask, depth_mask)
