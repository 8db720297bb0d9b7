# SPDX-License-Identifier: Apache-2.0
"""Data sets of frames with flow or depth for the Trainer."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .formats import Array, load, open_image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Size = tuple[int, int]
Read = Callable[[], Array]


@dataclass(frozen=True)
class Example:
    """Files of one example, and functions that read its labels.

    Attributes:
        name: name for tables and pictures.
        frame: file of the image, or of the first of two frames.
        next_frame: file of the second frame.
        flow: function that returns the flow, (2, rows, columns) in pixels, NaN where unknown.
        depth: function that returns the depth, (rows, columns), NaN where unknown.
        occluded: file of a mask. It is not zero where the point is hidden in the second frame.
    """

    name: str
    frame: Path
    next_frame: Path | None = None
    flow: Read | None = None
    depth: Read | None = None
    occluded: Path | None = None


def prepare(
    image: Image.Image | np.ndarray[Any, Any], size: Size | None, mean: Any, std: Any, name: str = "A frame"
) -> Tensor:
    """Normalised pixels of an image, (3, rows, columns), resized to `size` with antialiasing.

    Args:
        image: the image.
        size: (rows, columns) in pixels, or None for its own size.
        mean: mean of each channel.
        std: standard deviation of each channel.
        name: what errors call the image.

    Raises:
        ValueError: the image is no picture of 8 bits, or an array of another shape than (rows, columns, 3).
    """
    if isinstance(image, Image.Image) and image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{name} has the image mode {image.mode}, which Pillow turns into white where it is above 255. Convert "
            "it to 8 bits."
        )
    values = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(
            f"{name} must be a picture, or an array of uint8 of shape (rows, columns, 3), got {values.dtype} "
            f"of shape {values.shape}. Leave out transforms of the data set that make tensors."
        )
    pixels = torch.from_numpy(np.array(values)).permute(2, 0, 1).float() / 255
    if size is not None and tuple(pixels.shape[-2:]) != tuple(size):
        pixels = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    mean, std = (torch.as_tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (pixels - mean) / std


def check_frames(size: Any, mean: Any, std: Any) -> None:
    """Raise ValueError if frames cannot be resized or normalised so."""
    if size is not None and not (_is_list(size, 2) and all(_is_whole(length) and length > 0 for length in size)):
        raise ValueError(f"size must be (rows, columns) in pixels or None, got {size!r}.")
    for name, values in (("mean", mean), ("std", std)):
        if not (_is_list(values, 3) and all(math.isfinite(value) for value in values)):
            raise ValueError(f"{name} must be three numbers, one for each channel of RGB, got {values!r}.")
    if not all(value > 0 for value in std):
        raise ValueError(f"std must be above 0, got {std!r}: pixels are divided by it.")


def _is_list(values: Any, length: int) -> bool:
    is_list = isinstance(values, Sequence | np.ndarray | Tensor) and not isinstance(values, str)
    return (
        is_list
        and len(values) == length
        and all(isinstance(each, int | float | np.number | Tensor) for each in values)
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


class MotionDataset(Dataset[dict[str, Tensor]]):
    """Data set of frames with flow or depth, for [`FlowModel`], [`DepthModel`] and [`MotionModel`].

    An item is a dict with `pixel_values` and, if the example has them, `next_pixel_values`, `flow_labels`,
    `depth_labels` and `occluded`.

    Labels keep their own size, even if the frames are resized: the models predict at the size of the labels. Labels of
    different sizes do not fit into one batch: then use a batch size of 1.

    Args:
        examples: examples, for instance from [`find_examples`].
        size: (rows, columns) in pixels to resize the frames to. None: their own size.
        mean: mean of each channel, as in the backbone's processor.
        std: standard deviation of each channel, as in the backbone's processor.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        size: Size | None = None,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        check_frames(size, mean, std)
        self.examples = list(examples)
        self.size, self.mean, self.std = size, mean, std

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[operator.index(index)]
        item = {"pixel_values": self._frame(example.frame)}
        if example.next_frame is not None:
            item["next_pixel_values"] = self._frame(example.next_frame)
        if example.flow is not None:
            item["flow_labels"] = torch.from_numpy(example.flow())
        if example.depth is not None:
            item["depth_labels"] = torch.from_numpy(example.depth())
        if example.occluded is not None:
            with open_image(example.occluded) as mask:
                load(mask, example.occluded)
                item["occluded"] = torch.from_numpy(np.asarray(mask.convert("L")) > 0)
        return item

    def _frame(self, file: Path) -> Tensor:
        with open_image(file) as image:
            load(image, file)
            return prepare(image, self.size, self.mean, self.std, name=f"The frame {file}")


class TorchvisionPairs(Dataset[dict[str, Tensor]]):
    """Data set around one of torchvision's optical flow sets (`FlyingThings3D`, `HD1K`, ...).

    Args:
        dataset: data set with items (image, next image, flow) or (image, next image, flow, valid).
        size: (rows, columns) in pixels to resize the frames to. None: their own size.
        mean: mean of each channel, as in the backbone's processor.
        std: standard deviation of each channel, as in the backbone's processor.
    """

    def __init__(
        self,
        dataset: Any,
        size: Size | None = None,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        check_frames(size, mean, std)
        self.dataset, self.size, self.mean, self.std = dataset, size, mean, std

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        frame, next_frame, flow, *valid = self.dataset[index]
        if flow is None:
            raise ValueError("This split has no flow labels. Use split='train'.")
        labels = torch.as_tensor(flow).float()
        if valid and valid[0] is not None:
            labels = labels.where(torch.as_tensor(valid[0]).bool(), torch.nan)
        frames = (prepare(image, self.size, self.mean, self.std) for image in (frame, next_frame))
        return {**dict(zip(("pixel_values", "next_pixel_values"), frames, strict=True)), "flow_labels": labels}
