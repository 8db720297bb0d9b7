# SPDX-License-Identifier: Apache-2.0
"""Models for optical flow and depth on any vision backbone, for the standard Trainer and PEFT."""

from __future__ import annotations

from torch import Tensor

from .base import MotionBase, MotionOutput


class FlowModel(MotionBase):
    """Optical flow on any vision backbone.

    The arguments are those of `peft_promptmoe.motion.base.MotionBase`.

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

    There is one class per task because of the Trainer: it takes every forward argument with "label" in its name for a
    label, and reports `eval_loss` and metrics only if a batch has all of them.
    """

    tasks = ("flow",)

    def forward(
        self,
        pixel_values: Tensor,
        next_pixel_values: Tensor | None = None,
        flow_labels: Tensor | None = None,
        flow_mask: Tensor | None = None,
    ) -> MotionOutput:
        """Predict the flow from the first frame to the second.

        Args:
            pixel_values: (B, channels, rows, columns) first frames of any size, normalised for the backbone.
            next_pixel_values: second frames, of the same shape.
            flow_labels: (B, 2, H, W) true flow in pixels of the label's own size, x first, NaN where unknown. The
                prediction is resized to this size, and its values are scaled with it.
            flow_mask: (B, H, W), True where a pixel counts in the loss.

        Returns:
            The flow at the size of the labels, or of the images without labels, and the loss.

        Raises:
            ValueError: the second frames are missing, or an input has a wrong shape or type.
        """
        if next_pixel_values is None:
            raise ValueError("Flow is between two frames. Pass next_pixel_values, of the same shape as pixel_values.")
        return self._run(pixel_values, next_pixel_values, flow_labels=flow_labels, flow_mask=flow_mask)


class DepthModel(MotionBase):
    """Depth of single images, on any vision backbone, or by DPT, Depth Anything or GLPN with their own decoder.

    The arguments are those of `peft_promptmoe.motion.base.MotionBase`.

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
        """Predict the depth of images.

        Args:
            pixel_values: (B, channels, rows, columns) images of any size, normalised for the backbone.
            depth_labels: (B, H, W) true depth, 0 or NaN where unknown. The prediction is resized to this size.
            depth_mask: (B, H, W), True where a pixel counts in the loss.

        Returns:
            The depth at the size of the labels, or of the images without labels, and the loss.

        Raises:
            ValueError: an input has a wrong shape or type.
        """
        return self._run(pixel_values, None, depth_labels=depth_labels, depth_mask=depth_mask)


class MotionModel(MotionBase):
    """Flow and depth together, from one forward pass of the backbone over both frames.

    The arguments are those of `peft_promptmoe.motion.base.MotionBase`. A batch may lack the labels of one task: its
    loss is then left out. In a distributed run the batches of all processes must have labels of the same tasks. The
    Trainer reports `eval_loss` for such batches if `TrainingArguments.label_names` names only the labels that they
    have.
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
        """Predict the flow from the first frame to the second, and the depth of the first.

        Args:
            pixel_values: (B, channels, rows, columns) first frames of any size, normalised for the backbone.
            next_pixel_values: second frames, of the same shape. Without them no flow is predicted.
            flow_labels: (B, 2, H, W) true flow, as in [`FlowModel.forward`].
            depth_labels: (B, H, W) true depth of the first frames, as in [`DepthModel.forward`].
            flow_mask: (B, H, W), True where a pixel counts in the flow loss.
            depth_mask: (B, H, W), True where a pixel counts in the depth loss.

        Returns:
            Flow and depth, and the weighted sum of the losses of the tasks with labels.

        Raises:
            ValueError: an input has a wrong shape or type.
        """
        return self._run(pixel_values, next_pixel_values, flow_labels, depth_labels, flow_mask, depth_mask)
