# SPDX-License-Identifier: Apache-2.0
"""Image classification tasks of VTAB-1k's form, made from packaged real images that are resized once."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn
from transformers import AutoImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

import assets

TASKS: dict[str, Callable[..., datasets.DatasetDict]] = {"cifar10": assets.cifar10, "mnist": assets.mnist}


@dataclass(frozen=True)
class Images:
    """`pixels` (N, 3, rows, columns) of bytes, `labels` (N,), and (3, 1, 1) each what normalises the pixels."""

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 1  # all images are of one size

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        pixels = (self.pixels[chosen].float() / 255 - self.mean) / self.std
        return {"pixel_values": pixels, "labels": self.labels[chosen]}

    def select(self, chosen: list[int]) -> "Images":
        return Images(self.pixels[chosen], self.labels[chosen], self.mean, self.std)


@dataclass(frozen=True)
class Features:
    """`features` (N, D) that a frozen model's head reads, and `labels` (N,)."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 1

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        return {"features": self.features[chosen], "labels": self.labels[chosen]}

    def select(self, chosen: list[int]) -> "Features":
        return Features(self.features[chosen], self.labels[chosen])


class Classifier(nn.Module):
    """A model that gives logits or transformers' output, with the loss that `train` asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> ImageClassifierOutput:
        (inputs_only,) = inputs.values()
        output = self.model(inputs_only)
        logits = (output if isinstance(output, Tensor) else output.logits).float()
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def head_alone(head: nn.Module) -> Classifier:
    """A model of nothing but a head, on features that are already there."""
    return Classifier(nn.Sequential(OrderedDict(classifier=head)))


def load(task: str, model: str, size: int, test: int) -> dict[str, Images]:
    """Splits `train` of 800, `dev` of 200, `both` with the 1,000 of them, and `test`, prepared for `model`."""
    processor = AutoImageProcessor.from_pretrained(model)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    splits = TASKS[task](test=test)
    splits["both"] = datasets.concatenate_datasets([splits["train"], splits["dev"]])
    return {
        name: Images(pixels_of(data["image"], size), torch.tensor(data["label"]), mean, std)
        for name, data in splits.items()
    }


def pixels_of(images: list[Image], size: int) -> Tensor:
    """Bytes (N, 3, size, size)."""
    pictures = [image.convert("RGB").resize((size, size), Resampling.BICUBIC) for image in images]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def subset(labels: Tensor, size: int, seed: int) -> list[int]:
    """`size` random samples, of every class at least one; of one seed, smaller subsets are part of larger ones."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    first = {int(labels[i]): i for i in reversed(order)}
    if size < len(first):
        raise ValueError(f"{size} samples cannot have one of each of {len(first)} classes.")
    return [*first.values(), *(i for i in order if i not in first.values())][:size]
