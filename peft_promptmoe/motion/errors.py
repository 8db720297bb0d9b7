# SPDX-License-Identifier: Apache-2.0
"""Errors of flow and depth, computed per image as sums that can be added over images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

THRESHOLDS = (1, 3, 5)  # pixels
F1_PIXELS, F1_SHARE = 3.0, 0.05  # KITTI counts errors above both
DELTA = 1.25
PADDING = -100.0  # the Trainer pads labels of different sizes with this
# Evaluated shares of rows and columns: Garg et al. 2016, Eigen et al. 2014 (KITTI), and Eigen's crop for NYU.
CROPS = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
}


def known_flow(reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bool mask (H, W) of flow (2, H, W): True where finite, not padded by the Trainer, and True in `mask`."""
    known = torch.isfinite(reference).all(dim=0) & (reference != PADDING).any(dim=0)
    return known if mask is None else known & mask


def flow_sums(prediction: Tensor, reference: Tensor, known: Tensor) -> dict[str, float]:
    """Sums of flow errors over the known pixels of one image.

    Args:
        prediction: (2, H, W) in pixels, float64.
        reference: (2, H, W) in pixels.
        known: (H, W) bool, True for at least one pixel.

    Returns:
        Number of `pixels`; sums of end-point errors (`epe`, `zero_flow`, `constant_flow`); numbers of pixels with an
        error below a threshold (`1px` ...) and of outliers (`f1`).
    """
    found, true = prediction[:, known], reference[:, known]
    error, length = (found - true).norm(dim=0), true.norm(dim=0)
    sums = {"pixels": float(known.sum()), "epe": float(error.sum())}
    for pixels in THRESHOLDS:
        sums[f"{pixels}px"] = float((error < pixels).sum())
    # Counted as the rest, so that a prediction that is no number is an outlier.
    sums["f1"] = sums["pixels"] - float(((error <= F1_PIXELS) | (error <= F1_SHARE * length)).sum())
    sums["zero_flow"] = float(length.sum())
    sums["constant_flow"] = float((true - geometric_median(true)[:, None]).norm(dim=0).sum())
    return sums


def geometric_median(points: Tensor, rounds: int = 50) -> Tensor:
    """The point (C,) with the smallest mean distance to points (C, N), by Weiszfeld's iteration from their mean."""
    middle = points.mean(dim=1)
    for _ in range(rounds):
        weights = 1 / (points - middle[:, None]).norm(dim=0).clamp(min=1e-9)
        middle = (points * weights).sum(dim=1) / weights.sum()
    return middle


def median(values: Tensor) -> Tensor:
    """() the median of values (N,); of an even number the mean of the middle two, as numpy's (torch's: the lower)."""
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def crop_mask(reference: Tensor, crop: str) -> Tensor:
    """Bool mask (H, W): True in the part of an image that a crop keeps. What the Trainer has padded is no part of it.

    Args:
        reference: (H, W) depth.
        crop: name of the crop.
    """
    own = reference != PADDING
    rows, columns = (_length(own.any(dim=axis)) for axis in (1, 0))
    top, bottom, left, right = CROPS[crop]
    mask = torch.zeros_like(own)
    mask[int(top * rows) : int(bottom * rows), int(left * columns) : int(right * columns)] = True
    return mask


def _length(is_own: Tensor) -> int:
    """Number of rows or columns up to the last one of the image itself."""
    return int(is_own.nonzero().max()) + 1 if is_own.any() else 0


def depth_sums(prediction: Tensor, reference: Tensor) -> dict[str, float]:
    """Sums of depth errors over the known pixels of one image.

    Args:
        prediction: (N,) positive depths, float64.
        reference: (N,) positive depths.

    Returns:
        Number of `pixels`; sums of relative, squared relative and squared errors, of differences of logarithms and
        their squares; numbers of pixels with a ratio below 1.25, 1.25^2 and 1.25^3; and the sum of the relative error
        that the reference's median would have as a prediction.
    """
    error = prediction - reference
    logs = prediction.log() - reference.log()
    ratio = torch.maximum(prediction / reference, reference / prediction)
    sums = {
        "pixels": float(len(reference)),
        "abs_rel": float((error.abs() / reference).sum()),
        "sq_rel": float((error.square() / reference).sum()),
        "square": float(error.square().sum()),
        "log": float(logs.sum()),
        "log_square": float(logs.square().sum()),
        "constant": float(((median(reference) - reference).abs() / reference).sum()),
    }
    for power in (1, 2, 3):
        sums[f"delta{power}"] = float((ratio < DELTA**power).sum())
    return sums


def depth_errors(sums: dict[str, float]) -> dict[str, float]:
    """Errors from the sums of `depth_sums`. Smaller is better, except for `delta1` to `delta3` (shares of pixels)."""
    count = sums["pixels"]
    mean, square = sums["log"] / count, sums["log_square"] / count
    errors = {
        "abs_rel": sums["abs_rel"] / count,
        "sq_rel": sums["sq_rel"] / count,
        "rmse": (sums["square"] / count) ** 0.5,
        "rmse_log": square**0.5,
        "silog": 100 * max(square - mean**2, 0.0) ** 0.5,
        "abs_rel_constant": sums["constant"] / count,
    }
    return errors | {f"delta{power}": sums[f"delta{power}"] / count for power in (1, 2, 3)}


def add_up(images: Iterable[dict[str, float]]) -> dict[str, float]:
    """Add the sums of all images."""
    total: dict[str, float] = {}
    for sums in images:
        for key, value in sums.items():
            total[key] = total.get(key, 0.0) + value
    return total
