# SPDX-License-Identifier: Apache-2.0
"""Files of flow, disparity and depth as arrays; what is unknown in them becomes NaN, never a number."""

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
LARGEST = 2**15  # pixels along a side: more is no image, but a broken header


def read_flo(file: File) -> Array:
    """Middlebury's, Sintel's and FlyingChairs' .flo.

    Returns:
        (2, rows, columns) flow in pixels, x first; NaN where unknown.

    Raises:
        ValueError: the file is no .flo, or not all of one.
    """
    flow = _read_tagged(file, channels=2).transpose(2, 0, 1)
    return np.where((np.abs(flow) > UNKNOWN).any(axis=0), np.float32(np.nan), flow)


def write_flo(file: File, flow: NDArray[np.floating]) -> None:
    """Write flow (2, rows, columns), NaN where unknown, as .flo.

    Raises:
        ValueError: the array has another shape.
    """
    if np.ndim(flow) != 3 or np.shape(flow)[0] != 2:
        raise ValueError(f"Flow of shape {np.shape(flow)}: has to be (2, rows, columns), x first.")
    values = np.asarray(flow, dtype="<f4").transpose(1, 2, 0)
    values = np.where(np.isnan(values), np.float32(10 * UNKNOWN), values)
    size = np.array([values.shape[1], values.shape[0]], dtype="<i4")
    Path(file).write_bytes(TAG.tobytes() + size.tobytes() + values.astype("<f4").tobytes())


def read_dpt(file: File) -> Array:
    """Sintel's depth, .dpt.

    Returns:
        (rows, columns) depth in metres of the film's scenes.

    Raises:
        ValueError: the file is no .dpt, or not all of one.
    """
    return _read_tagged(file, channels=1)[..., 0]


def _read_tagged(file: File, channels: int) -> Array:
    content = Path(file).read_bytes()
    if len(content) < 12 or np.frombuffer(content[:4], "<f4")[0] != TAG:
        raise ValueError(f"{os.fspath(file)} does not begin with the tag {TAG} of .flo and .dpt files.")
    columns, rows = (int(length) for length in np.frombuffer(content[4:12], "<i4"))
    if not (0 < rows <= LARGEST and 0 < columns <= LARGEST) or len(content) - 12 != 4 * channels * rows * columns:
        raise ValueError(
            f"{os.fspath(file)} says {rows} x {columns} pixels and holds {len(content) - 12} bytes of values: it is "
            "not complete, or of another format."
        )
    return np.frombuffer(content, "<f4", offset=12).reshape(rows, columns, channels).astype(np.float32)


def read_pfm(file: File) -> Array:
    """A .pfm of one channel (Middlebury's disparity) or of three (FlyingThings' flow and disparity).

    Returns:
        (rows, columns), or (3, rows, columns), top row first; NaN where infinite, which is Middlebury's unknown.

    Raises:
        ValueError: the file is no .pfm, or not all of one.
    """
    content = Path(file).read_bytes()
    head = re.match(
        rb"(P[Ff])\s+(\d{1,9})\s+(\d{1,9})\s+([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[^\S\n]*\n", content
    )
    if head is None:
        raise ValueError(f"{os.fspath(file)} does not begin with the header of a .pfm file.")
    channels = 3 if head[1] == b"PF" else 1
    columns, rows = int(head[2]), int(head[3])
    is_size = 0 < rows <= LARGEST and 0 < columns <= LARGEST
    if not is_size or len(content) - head.end() != 4 * channels * rows * columns:
        raise ValueError(
            f"{os.fspath(file)} says {rows} x {columns} pixels and holds {len(content) - head.end()} bytes of values."
        )
    order = "<" if float(head[4]) < 0 else ">"  # the sign of the scale says the order of bytes
    values = np.frombuffer(content, f"{order}f4", offset=head.end()).reshape(rows, columns, channels)
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)[::-1]  # bottom row first in the file
    return np.ascontiguousarray(values[..., 0] if channels == 1 else values.transpose(2, 0, 1))


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
    """KITTI's and HD1K's flow: 16-bit png of (value - 2^15) / 64, whose third channel says what is known.

    Returns:
        (2, rows, columns) flow in pixels, x first; NaN where unknown.

    Raises:
        ValueError: the file is no 16-bit png of three channels.
    """
    high, low = _bytes_of(file, "RGB;16B"), _bytes_of(file, "RGB;16L")
    values = (high.astype(np.float32) * 256 + low).transpose(2, 0, 1)
    flow = (values[:2] - 2**15) / 64
    return np.where(values[2] > 0, flow, np.float32(np.nan)).astype(np.float32)


def _bytes_of(file: File, order: str) -> NDArray[np.uint8]:
    """(rows, columns, 3) of the first or, with the order of bytes the wrong way round, the second byte of every value.

    Pillow has no mode of 16 bits and three channels: it reads such files without a word as 8 bits, the first byte of
    each. torchvision's decoder, which has one, is deprecated.
    """
    with Image.open(file) as opened:
        image: Any = opened
        if image.mode != "RGB" or any(tile[3] != "RGB;16B" for tile in image.tile):
            raise ValueError(f"{os.fspath(file)} is no 16-bit png of three channels, as KITTI's flow is.")
        image.tile = [(*tile[:3], order) for tile in image.tile]
        load(image, file)
        return np.asarray(image)


def read_png16(file: File, scale: float) -> Array:
    """Depth or disparity as a 16-bit grey png: KITTI's of metres or pixels (scale 256), NYU's of metres (1000).

    Args:
        file: of one channel.
        scale: values of a unit.

    Returns:
        (rows, columns) in units; NaN where the file has zero, which is unknown.

    Raises:
        ValueError: the file is no 16-bit image of one channel.
    """
    with Image.open(file) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"{os.fspath(file)} is a picture of mode {image.mode}, not a 16-bit png of one channel.")
        load(image, file)
        values = np.asarray(image).astype(np.float32)
    return np.where(values > 0, values / np.float32(scale), np.float32(np.nan))


def read_grey(file: File) -> Array:
    """Disparity as 8-bit grey values (Middlebury 2006 at full size): pixels; NaN where the file has zero."""
    with Image.open(file) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"{os.fspath(file)} is a picture of mode {image.mode}, not of grey values.")
        load(image, file)
        values = np.asarray(image.convert("L")).astype(np.float32)
    return np.where(values > 0, values, np.float32(np.nan))


def flow_of_disparity(disparity: Array) -> Array:
    """(2, rows, columns) flow from the left to the right view, of disparity (rows, columns) in pixels."""
    flow = np.stack([-disparity, np.where(np.isnan(disparity), np.float32(np.nan), np.float32(0))])
    return flow.astype(np.float32)
