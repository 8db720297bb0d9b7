# SPDX-License-Identifier: Apache-2.0
"""Pictures of flow, flow errors and depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Picture = NDArray[np.uint8]


def _array(values: Any) -> NDArray[np.float32]:
    found = values.detach().float().cpu() if isinstance(values, Tensor) else values
    return np.asarray(found, dtype=np.float32)


def flow_picture(flow: Any, max_flow: float | None = None) -> Picture:
    """Draw flow with the usual colour wheel (Baker et al. 2011): hue for direction, saturation for length.

    Args:
        flow: (2, rows, columns) array or tensor in pixels, NaN where unknown. Unknown pixels are black.
        max_flow: length that gets the full colour, in pixels; longer flow looks the same. None: the longest flow.

    Returns:
        (rows, columns, 3) uint8.

    Raises:
        ValueError: the flow has another shape, or `max_flow` is negative.
    """
    from torchvision.utils import flow_to_image

    _check_scale(max_flow=0.0 if max_flow is None else max_flow)

    values = torch.from_numpy(_array(flow))
    if values.ndim != 3 or values.shape[0] != 2:
        raise ValueError(f"Flow must have the shape (2, rows, columns), x first, got {tuple(values.shape)}.")
    known = torch.isfinite(values).all(dim=0)
    values = torch.where(known, values, 0.0)
    length = values.norm(dim=0)
    top = float(length.max()) if max_flow is None else max_flow
    values = values * (top / length.clamp(min=1e-9)).clamp(max=1)
    # torchvision divides by the longest flow of a picture. An extra column sets this length to `max_flow`.
    scale = torch.zeros(2, values.shape[1], 1)
    scale[0] = max(top, 1e-9)
    picture = flow_to_image(torch.cat([values, scale], dim=2))[..., :-1].permute(1, 2, 0).numpy()
    return np.where(known[..., None].numpy(), picture, np.uint8(0))


def flow_legend(side: int = 64) -> Picture:
    """The colour wheel, (side, side, 3): a pixel has the colour of flow from the centre to it. White outside."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) * 2 / max(side - 1, 1) - 1
    wheel = flow_picture(np.stack([x, y]), max_flow=1.0)
    return np.where((np.hypot(x, y) <= 1)[..., None], wheel, np.uint8(255))


def error_picture(found: Any, true: Any, max_error: float) -> Picture:
    """Draw end-point errors, from dark (no error) to bright (`max_error` or more).

    Args:
        found: (2, rows, columns) predicted flow.
        true: (2, rows, columns) true flow, NaN where unknown. Unknown pixels are black.
        max_error: error that gets the brightest colour, in pixels.

    Returns:
        (rows, columns, 3) uint8.

    Raises:
        ValueError: the two have different shapes, or `max_error` is negative.
    """
    _check_scale(max_error=max_error)
    if np.shape(found) != np.shape(true):
        raise ValueError(f"The predicted flow has shape {tuple(found.shape)}, the true flow {tuple(true.shape)}.")
    error = np.linalg.norm(_array(found) - _array(true), axis=0)
    return _colours(error / max(max_error, 1e-9), "inferno")


def depth_picture(depth: Any, near: float, far: float) -> Picture:
    """Draw depth, bright at `near` and dark at `far`. The colour follows inverse depth.

    Args:
        depth: (rows, columns), zero or NaN where unknown. Unknown pixels are black.
        near: depth of the brightest colour.
        far: depth of the darkest colour.

    Returns:
        (rows, columns, 3) uint8.

    Raises:
        ValueError: `near` and `far` are not positive, or not in this order.
    """
    if not 0 < near <= far:
        raise ValueError(f"near={near!r} and far={far!r} must be positive, and near not above far.")
    values = _array(depth)
    inverse = 1 / np.where(np.isfinite(values) & (values > 0), values, np.nan)
    return _colours((inverse - 1 / far) / max(1 / near - 1 / far, 1e-12), "magma")


def _check_scale(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}.")


def _colours(shares: NDArray[np.floating[Any]], name: str) -> Picture:
    from matplotlib import colormaps

    colours = colormaps[name](np.clip(np.nan_to_num(shares), 0, 1))[..., :3]
    return np.where(np.isfinite(shares)[..., None], (colours * 255).round(), 0).astype(np.uint8)
