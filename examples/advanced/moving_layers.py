# SPDX-License-Identifier: Apache-2.0
"""Image pairs with exact flow, occlusion and depth: a photo, and cut-outs of others in front of it, all moving.

Every layer has a texture (a photo), a mask (all of the frame for the background, a blob for the others), an inverse
depth that is affine in the pixel's place, and an affine map that moves it. Nearer layers hide farther ones. In mode

- `chairs` every layer moves by a map of its own, as the cut-outs of FlyingChairs do; depth only says who hides whom;
- `rigid` flow is inverse depth times one translation: a camera that moves sideways past slanted planes;
- `stereo` it is the same with a move to the right only, so that flow is (-disparity, 0).

Coordinates are (x, y) in pixels, centres at integers. Both frames are resampled from the textures in the same way, so
that neither is sharper, and each has its own gain, offset and noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from peft_promptmoe.motion.data import IMAGENET, prepare

Array = NDArray[np.float64]
MODES = ("chairs", "chairs", "rigid", "stereo")  # how often each comes up


def bilinear(texture: NDArray[Any], x: Array, y: Array) -> Array:
    """(..., 3) colours of a texture (H, W, 3) at places (x, y), mirrored outside."""
    rows, columns = texture.shape[:2]

    def mirrored(places: Array, length: int) -> Array:
        places = np.mod(places, 2 * (length - 1))
        return np.where(places > length - 1, 2 * (length - 1) - places, places)

    x, y = mirrored(x, columns), mirrored(y, rows)
    left, top = np.minimum(x.astype(int), columns - 2), np.minimum(y.astype(int), rows - 2)
    right, low = (x - left)[..., None], (y - top)[..., None]
    upper = texture[top, left] * (1 - right) + texture[top, left + 1] * right
    lower = texture[top + 1, left] * (1 - right) + texture[top + 1, left + 1] * right
    return upper * (1 - low) + lower * low


class Blob:
    """A soft-edged shape: a circle whose radius is modulated by four waves."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.center = rng.uniform(0.1, 0.9, 2) * size
        self.radius = rng.uniform(0.12, 0.32) * size
        self.waves = rng.normal(0, 0.14, 4) / np.sqrt(np.arange(1, 5))
        self.phases = rng.uniform(0, 2 * np.pi, 4)

    def __call__(self, x: Array, y: Array) -> Array:
        dx, dy = x - self.center[0], y - self.center[1]
        angles = np.arctan2(dy, dx)[..., None] * np.arange(1, 5) + self.phases
        radius = self.radius * (1 + (self.waves * np.cos(angles)).sum(axis=-1))
        return np.clip(radius - np.hypot(dx, dy) + 0.5, 0, 1)


@dataclass
class Layer:
    """One layer.

    Attributes:
        texture: the photo, (H, W, 3) from 0 to 1.
        mask: the shape; None for the background.
        zoom: texture pixels of a frame pixel.
        shift: where the frame's corner is in the texture.
        rho: inverse depth in the middle of the frame.
        slant: its change over the frame, along x and y.
        matrix: of the map p -> matrix (p - middle) + middle + move.
        move: in pixels.
        size: of the frame.
    """

    texture: NDArray[Any]
    mask: Blob | None
    zoom: float
    shift: Array
    rho: float
    slant: Array
    matrix: Array
    move: Array
    size: int

    def inverse_depth(self, x: Array, y: Array) -> Array:
        middle = self.size / 2
        return self.rho + (self.slant[0] * (x - middle) + self.slant[1] * (y - middle)) / self.size

    def forward(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Where in frame 2 the points at (x, y) of frame 1 are."""
        middle, m = self.size / 2, self.matrix
        dx, dy = x - middle, y - middle
        return (
            m[0, 0] * dx + m[0, 1] * dy + middle + self.move[0],
            m[1, 0] * dx + m[1, 1] * dy + middle + self.move[1],
        )

    def backward(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Where in frame 1 the points at (x, y) of frame 2 were."""
        middle, m = self.size / 2, np.linalg.inv(self.matrix)
        dx, dy = x - middle - self.move[0], y - middle - self.move[1]
        return m[0, 0] * dx + m[0, 1] * dy + middle, m[1, 0] * dx + m[1, 1] * dy + middle

    def color(self, x: Array, y: Array) -> Array:
        return bilinear(self.texture, x * self.zoom + self.shift[0], y * self.zoom + self.shift[1])

    def opacity(self, x: Array, y: Array) -> Array:
        return np.ones_like(x) if self.mask is None else self.mask(x, y)


def make_layers(
    rng: np.random.Generator, photos: Sequence[NDArray[Any]], size: int, mode: str, reach: float
) -> list[Layer]:
    """A background and one to four cut-outs, from far to near."""
    count = int(rng.integers(1, 5))
    rho = np.sort(rng.uniform(0.25, 1.0, count + 1))
    rho[0] = rng.uniform(0.1, 0.3)
    if mode == "stereo":
        view = np.array([-reach * rng.uniform(0.4, 1.0), 0.0])
    else:
        view = rng.uniform(-1, 1, 2)
        view = view * reach * rng.uniform(0.3, 1.0) / max(np.abs(view).max(), 1e-6)
    layers = []
    for number in range(count + 1):
        slant = rng.uniform(-0.3, 0.3, 2)
        below = rho[number] - (rho[number - 1] if number else 0.02)
        above = rho[number + 1] - rho[number] if number < count else 1.0
        # Layers never cross: what is in front is nearer everywhere.
        slant *= min(1.0, 0.45 * min(below, above) / (np.abs(slant).sum() / 2))
        if mode == "chairs":
            angle, zoom = rng.normal(0, 0.08), 1 + rng.normal(0, 0.06)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            matrix = zoom * turn @ (np.eye(2) + rng.normal(0, 0.02, (2, 2)))
            move = rng.uniform(-1, 1, 2) * reach * (0.35 + 0.65 * rho[number] if number else 0.5)
        else:
            matrix, move = np.eye(2) + np.outer(view, slant) / size, view * rho[number]
        photo = photos[rng.integers(len(photos))]
        zoom = max(rng.uniform(0.8, 1.25) * min(photo.shape[:2]) / (1.5 * size), 0.6)
        shift = rng.uniform(0, 1, 2) * np.array(photo.shape[1::-1])
        mask = Blob(rng, size) if number else None
        layers.append(Layer(photo, mask, zoom, shift, rho[number], slant, matrix, move, size))
    return layers


def make_pair(
    rng: np.random.Generator,
    photos: Sequence[NDArray[Any]],
    size: int = 112,
    mode: str = "chairs",
    reach: float = 14.0,
    noise: float = 0.01,
) -> dict[str, NDArray[Any]]:
    """One pair.

    Args:
        rng: makes everything.
        photos: textures (H, W, 3) from 0 to 1.
        size: of the square frames, in pixels.
        mode: "chairs", "rigid" or "stereo".
        reach: pixels that the nearest layer may move by.
        noise: spread of the frames' noise, of a range of 1.

    Returns:
        `frames` (2, size, size, 3) bytes; `flow` (2, size, size) of frame 1 in pixels; `occluded` (size, size), true
        where frame 2 does not show the point; `inverse_depth` (size, size); `layer` (size, size), 0 for the
        background.
    """
    layers = make_layers(rng, photos, size, mode, reach)
    y, x = np.mgrid[0:size, 0:size].astype(np.float64)
    frames, flow = np.zeros((2, size, size, 3)), np.zeros((2, size, size))
    inverse, top = np.zeros((size, size)), np.zeros((size, size), int)
    for number, layer in enumerate(layers):
        before = layer.backward(x, y)
        for frame, places in enumerate(((x, y), before)):
            opacity = layer.opacity(*places)[..., None]
            frames[frame] = frames[frame] * (1 - opacity) + opacity * layer.color(*places)
        shown = layer.opacity(x, y) > 0.5
        after = layer.forward(x, y)
        for axis, place in enumerate((x, y)):
            flow[axis][shown] = (after[axis] - place)[shown]
        inverse[shown], top[shown] = layer.inverse_depth(x, y)[shown], number
    target = x + flow[0], y + flow[1]
    hidden = (target[0] < 0) | (target[1] < 0) | (target[0] > size - 1) | (target[1] > size - 1)
    for number, layer in enumerate(layers):
        hidden |= (layer.opacity(*layer.backward(*target)) > 0.5) & (number > top)
    for frame in range(2):
        lit = (frames[frame] - 0.5) * rng.uniform(0.9, 1.1) + 0.5 + rng.normal(0, 0.02)
        frames[frame] = np.clip(lit + rng.normal(0, noise, lit.shape), 0, 1)
    return {
        "frames": (frames * 255).round().astype(np.uint8),
        "flow": flow.astype(np.float32),
        "occluded": hidden,
        "inverse_depth": np.maximum(inverse, 0.02).astype(np.float32),
        "layer": top.astype(np.uint8),
    }


class GeneratedPairs(Dataset[dict[str, Tensor]]):
    """Pairs made when they are asked for, each by its number and the seed: the same ones in any order and process.

    Args:
        photos: textures.
        count: of pairs.
        seed: of the set.
        shown: (rows, columns) that the frames are resized to; labels stay at their own size.
        size: of the pairs as they are made.
        mean: of the backbone's processor.
        std: of the backbone's processor.
    """

    def __init__(
        self,
        photos: Sequence[NDArray[Any]],
        count: int,
        seed: int,
        shown: tuple[int, int] = (224, 224),
        size: int = 112,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        self.photos, self.count, self.seed = photos, count, seed
        self.shown, self.size, self.mean, self.std = shown, size, mean, std

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        pair = make_pair(rng, self.photos, self.size, mode=MODES[index % len(MODES)])
        first, second = (prepare(frame, self.shown, self.mean, self.std) for frame in pair["frames"])
        return {
            "pixel_values": first,
            "next_pixel_values": second,
            "flow_labels": torch.from_numpy(pair["flow"]),
            "depth_labels": torch.from_numpy(1 / pair["inverse_depth"]),
            "occluded": torch.from_numpy(pair["occluded"]),
        }
