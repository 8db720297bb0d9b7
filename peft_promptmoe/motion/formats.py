# SPDX-License-Identifier: Apache-2.0
"""Readers of flow, disparity and depth files. Unknown values become NaN."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
File = str | os.PathLike[str]

TAG = np.float32(202021.25)  # of .flo and .dpt
UNKNOWN = 1e9  # Middlebury writes more than this where flow is unknown
LARGEST = 2**15  # pixels along a side; more means a broken header


def read_flo(file: File) -> Array:
    """Read a .flo file (flow of Middlebury, Sintel and FlyingChairs).

    Returns:
        (2, rows, columns) flow in pixels, x first, NaN where unknown.

    Raises:
        ValueError: the file is not a .flo file, or is incomplete.
    """
    flow = _read_tagged(file, channels=2).transpose(2, 0, 1)
    return np.where((np.abs(flow) > UNKNOWN).any(axis=0), np.float32(np.nan), flow)


def write_flo(file: File, flow: NDArray[np.floating]) -> None:
    """Write flow (2, rows, columns) in pixels, NaN where unknown, to a .flo file.

    Raises:
        ValueError: the array has another shape.
    """
    if np.ndim(flow) != 3 or np.shape(flow)[0] != 2:
        raise ValueError(f"flow must have the shape (2, rows, columns), x first, got {np.shape(flow)}.")
    values = np.asarray(flow, dtype="<f4").transpose(1, 2, 0)
    values = np.where(np.isnan(values), np.float32(10 * UNKNOWN), values)
    size = np.array([values.shape[1], values.shape[0]], dtype="<i4")
    Path(file).write_bytes(TAG.tobytes() + size.tobytes() + values.astype("<f4").tobytes())


def read_dpt(file: File) -> Array:
    """Read a .dpt file (depth of Sintel).

    Returns:
        (rows, columns) depth in metres of the film's scene.

    Raises:
        ValueError: the file is not a .dpt file, or is incomplete.
    """
    return _read_tagged(file, channels=1)[..., 0]


def _read_tagged(file: File, channels: int) -> Array:
    content = Path(file).read_bytes()
    if len(content) < 12 or np.frombuffer(content[:4], "<f4")[0] != TAG:
        raise ValueError(f"{os.fspath(file)} is not a .flo or .dpt file: it does not start with their tag {TAG}.")
    columns, rows = (int(length) for length in np.frombuffer(content[4:12], "<i4"))
    if not (0 < rows <= LARGEST and 0 < columns <= LARGEST) or len(content) - 12 != 4 * channels * rows * columns:
        raise ValueError(
            f"{os.fspath(file)} is incomplete or of another format: its header says {rows} x {columns} pixels, and it "
            f"holds {len(content) - 12} bytes of values."
        )
    return np.frombuffer(content, "<f4", offset=12).reshape(rows, columns, channels).astype(np.float32)


def read_pfm(file: File) -> Array:
    """Read a .pfm file with one channel (disparity of Middlebury) or three (flow and disparity of FlyingThings).

    Returns:
        (rows, columns) or (3, rows, columns), top row first. NaN where the file has infinity (Middlebury: unknown).

    Raises:
        ValueError: the file is not a .pfm file, or is incomplete.
    """
    content = Path(file).read_bytes()
    head = re.match(
        rb"(P[Ff])\s+(\d{1,9})\s+(\d{1,9})\s+([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[^\S\n]*\n", content
    )
    if head is None:
        raise ValueError(f"{os.fspath(file)} is not a .pfm file: it does not start with a .pfm header.")
    channels = 3 if head[1] == b"PF" else 1
    columns, rows = int(head[2]), int(head[3])
    is_size = 0 < rows <= LARGEST and 0 < columns <= LARGEST
    if not is_size or len(content) - head.end() != 4 * channels * rows * columns:
        raise ValueError(
            f"{os.fspath(file)} is incomplete or of another format: its header says {rows} x {columns} pixels, and it "
            f"holds {len(content) - head.end()} bytes of values."
        )
    order = "<" if float(head[4]) < 0 else ">"  # the sign of the scale gives the byte order
    values = np.frombuffer(content, f"{order}f4", offset=head.end()).reshape(rows, columns, channels)
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)[
        ::-1
    ]  # the file starts with the bottom row
    return np.ascontiguousarray(values[..., 0] if channels == 1 else values.transpose(2, 0, 1))


def open_image(file: File) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        OSError: there is no such file, or it is no image.
        ValueError: the image has so many pixels that Pillow takes it for an attack, which it says without its name.
    """
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{os.fspath(file)} is too large: {error}") from error


def load(image: Image.Image, file: File) -> None:
    """Decode an image that has been opened.

    Raises:
        ValueError: the file is damaged, which Pillow says without its name.
    """
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{os.fspath(file)} is not complete or damaged: {error}.") from error


def read_kitti_flow(file: File) -> Array:
    """Read a flow file of KITTI or HD1K: a 16-bit PNG of 64 * flow + 2^15, with the known pixels in the third channel.

    Returns:
        (2, rows, columns) flow in pixels, x first, NaN where unknown.

    Raises:
        ValueError: the file is not a 16-bit PNG with three channels.
    """
    high, low = _bytes_of(file, "RGB;16B"), _bytes_of(file, "RGB;16L")
    values = (high.astype(np.float32) * 256 + low).transpose(2, 0, 1)
    flow = (values[:2] - 2**15) / 64
    return np.where(values[2] > 0, flow, np.float32(np.nan)).astype(np.float32)


def _bytes_of(file: File, order: str) -> NDArray[np.uint8]:
    """The first byte of every value, (rows, columns, 3), or the second byte if the byte order is swapped.

    Pillow cannot read 16 bits with three channels: without an error it reads only the first byte of each value.
    torchvision's decoder can, but is deprecated.
    """
    with open_image(file) as opened:
        image: Any = opened
        if image.mode != "RGB" or any(tile[3] != "RGB;16B" for tile in image.tile):
            raise ValueError(f"{os.fspath(file)} is not a 16-bit png with three channels, the format of KITTI's flow.")
        image.tile = [(*tile[:3], order) for tile in image.tile]
        load(image, file)
        return np.asarray(image)


def read_png16(file: File, scale: float) -> Array:
    """Read depth or disparity from a 16-bit grey PNG: KITTI (metres or pixels, scale 256), NYU (metres, scale 1000).

    Args:
        file: a PNG with one channel.
        scale: value in the file that stands for one unit.

    Returns:
        (rows, columns) in units. NaN where the file has zero (unknown).

    Raises:
        ValueError: the file is not a 16-bit image with one channel, or the scale is no positive number.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale!r}.")
    with open_image(file) as image:
        if not image.mode.startswith("I"):
            raise ValueError(
                f"{os.fspath(file)} has the image mode {image.mode}; a 16-bit png with one channel is needed."
            )
        load(image, file)
        values = np.asarray(image).astype(np.float32)
    return np.where(values > 0, values / np.float32(scale), np.float32(np.nan))


def read_grey(file: File) -> Array:
    """Read disparity in pixels from an 8-bit grey image (Middlebury 2006, full size). NaN where the file has zero."""
    with open_image(file) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"{os.fspath(file)} has the image mode {image.mode}; a grey image is needed.")
        load(image, file)
        colours = np.asarray(image.convert("RGB"))
        if (colours != colours[..., :1]).any():
            raise ValueError(
                f"{os.fspath(file)} has a palette of colours, not of grey values. Store the values as grey."
            )
        values = colours[..., 0].astype(np.float32)
    return np.where(values > 0, values, np.float32(np.nan))


def flow_of_disparity(disparity: Array) -> Array:
    """Flow (2, rows, columns) from the left to the right view, from disparity (rows, columns) in pixels."""
    flow = np.stack([-disparity, np.where(np.isnan(disparity), np.float32(np.nan), np.float32(0))])
    return flow.astype(np.float32)
