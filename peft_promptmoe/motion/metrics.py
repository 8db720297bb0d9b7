# SPDX-License-Identifier: Apache-2.0
"""Metrics of flow and depth as `evaluate.Metric`s. They download nothing and keep no predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from .errors import CROPS, THRESHOLDS, add_up, crop_mask, depth_errors, depth_sums, flow_sums, known_flow, median

MAP = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))


class PixelMetric(evaluate.Metric):
    """Base of the metrics. Only sums are kept of each image, so images may have different sizes."""

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process={kwargs['num_process']}: sums are kept by each process for itself. Gather predictions "
                "and references first, as the Trainer and accelerate's gather_for_metrics do, and leave num_process "
                "at 1."
            )
        self._images: list[dict[str, dict[str, float]]] = []
        super().__init__(**kwargs)

    def __len__(self) -> int:
        return len(self._images)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **masks: Any) -> None:
        """Add a batch of arrays or tensors.

        Args:
            predictions: (B, ...) predicted flow or depth.
            references: (B, ...) true flow or depth, of the same shape.
            masks: (B, H, W) by name, True or above 0 where a pixel counts.

        Raises:
            ValueError: shapes or numbers of images differ, or one of the two is missing.
        """
        _check_both(predictions, references)
        counts = {"predictions": predictions, "references": references}
        counts |= {name: mask for name, mask in masks.items() if mask is not None}
        if len({len(values) for values in counts.values()}) > 1:
            found = " and ".join(f"{len(values)} {name}" for name, values in counts.items())
            raise ValueError(f"There are {found}. Pass one for each image.")
        images = []
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            own = {name: mask[index] for name, mask in masks.items() if mask is not None}
            images.append(self._image(prediction, reference, own))
        self._images += images  # all or none: a batch that is refused and given again must not count twice

    def add(self, *, prediction: Any = None, reference: Any = None, **masks: Any) -> None:
        """Add one image, without the batch dimension. `evaluate.combine` names its arguments in the plural.

        Raises:
            ValueError: shapes differ, or one of the two is missing.
        """
        prediction, reference = masks.pop("predictions", prediction), masks.pop("references", reference)
        self._images.append(self._image(prediction, reference, masks))

    def _image(self, prediction: Any, reference: Any, masks: dict[str, Any]) -> dict[str, dict[str, float]]:
        _check_both(prediction, reference)
        found, true = _tensor(prediction).double(), _tensor(reference).double()
        if found.shape != true.shape:
            raise ValueError(
                f"The prediction has shape {tuple(found.shape)}, the reference {tuple(true.shape)}. Pass the labels "
                "to the model: it then predicts at the size of the labels."
            )
        given = {name: _tensor(mask) > 0 for name, mask in masks.items() if mask is not None}
        for name, mask in given.items():
            if mask.shape != true.shape[-2:]:
                raise ValueError(f"{name} has shape {tuple(mask.shape)}, but the image has {tuple(true.shape[-2:])}.")
        return self._sums(found, true, **given)

    def compute(self, *, predictions: Any = None, references: Any = None, **masks: Any) -> dict[str, float]:
        """Return the errors over all images added since the last `compute`, including a batch passed here.

        Raises:
            ValueError: no image was added, no pixel is valid, or masks are passed without a batch.
        """
        if predictions is not None or references is not None or masks:
            self.add_batch(predictions=predictions, references=references, **masks)
        images, self._images = self._images, []
        return self._errors([image for image in images if image])

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": MAP, "references": MAP})
        return evaluate.MetricInfo(description=type(self).__doc__ or "", citation="", features=features)

    def _sums(self, found: Tensor, true: Tensor, **masks: Tensor) -> dict[str, dict[str, float]]:
        """Sums over an image's valid pixels, by group of pixels. Empty for an image without valid pixels."""
        raise NotImplementedError

    def _errors(self, images: list[dict[str, dict[str, float]]]) -> dict[str, float]:
        raise NotImplementedError


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    # Copied, because torch takes no flipped or big-endian arrays, which readers of files return.
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _check_both(predictions: Any, references: Any) -> None:
    if predictions is None or references is None:
        missing = "predictions" if predictions is None else "references"
        raise ValueError(f"There are no {missing}: errors are between predictions and references. Give both.")


def _check_some(images: Sequence[Any]) -> None:
    if not images:
        raise ValueError(
            "No pixel with a known reference was added. Pixels that are NaN, infinite or masked out do not count; for "
            "depth neither do pixels outside min_depth to cap."
        )


class EndPointError(PixelMetric):
    """Metric of optical flow: end-point error, with two baselines (no motion, one motion per image).

    Pixels do not count if the reference is NaN or infinite, or `mask` is False. The optional mask `occluded` is True
    where the point is hidden in the second frame.

    `compute` returns

    - `epe`: mean distance to the true flow in pixels, over the valid pixels of all images; `epe_per_image`: mean over
      the images of their means
    - `1px`, `3px`, `5px`: shares of pixels with an error below 1, 3 and 5 pixels
    - `f1_all`: KITTI's outliers in per cent: errors above 3 pixels and above 5 % of the true length
    - `epe_zero_flow`: `epe` of the prediction "no motion", a strong baseline if motions are small;
      `epe_constant_flow`: `epe` of the best single motion for each image
    - `epe_visible`, `epe_occluded`: if `occluded` was passed
    - `images`, `pixels`: numbers that counted

    Example:

        ```py
        >>> from peft_promptmoe.motion import EndPointError
        >>> metric = EndPointError()
        >>> metric.add_batch(predictions=model(**batch).flow, references=batch["flow_labels"])
        >>> metric.compute()["epe"]
        ```
    """

    def _sums(self, found: Tensor, true: Tensor, **masks: Tensor) -> dict[str, dict[str, float]]:
        if true.ndim != 3 or true.shape[0] != 2:
            raise ValueError(f"Flow must have the shape (2, rows, columns), x first, got {tuple(true.shape)}.")
        if unknown := set(masks) - {"mask", "occluded"}:
            raise ValueError(f"EndPointError takes the masks `mask` and `occluded`, not {sorted(unknown)}.")
        known = known_flow(true, masks.get("mask"))
        groups = {"all": known}
        if (occluded := masks.get("occluded")) is not None:
            groups |= {"visible": known & ~occluded, "occluded": known & occluded}
        return {name: flow_sums(found, true, pixels) for name, pixels in groups.items() if bool(pixels.any())}

    def _errors(self, images: list[dict[str, dict[str, float]]]) -> dict[str, float]:
        _check_some(images)
        every = [image["all"] for image in images]
        total = add_up(every)
        count = total["pixels"]
        errors = {
            "epe": total["epe"] / count,
            "epe_per_image": float(np.mean([image["epe"] / image["pixels"] for image in every])),
            **{f"{pixels}px": total[f"{pixels}px"] / count for pixels in THRESHOLDS},
            "f1_all": 100 * total["f1"] / count,
            "epe_zero_flow": total["zero_flow"] / count,
            "epe_constant_flow": total["constant_flow"] / count,
            "images": float(len(images)),
            "pixels": count,
        }
        for group in ("visible", "occluded"):
            if some := [image[group] for image in images if group in image]:
                part = add_up(some)
                errors[f"epe_{group}"] = part["epe"] / part["pixels"]
        return errors


class DepthError(PixelMetric):
    """Metric of depth: errors over the valid pixels of all images, and as means over images.

    Most published figures are means over images (`_per_image`). Pixels do not count if the reference is zero, NaN,
    infinite or outside `min_depth` to `cap`, if they are outside the crop, or if `mask` is False. Predictions are
    clipped to `min_depth` and `cap`, as usual.

    `compute` returns `abs_rel`, `sq_rel`, `rmse`, `rmse_log`, `silog` (100 times the standard deviation of the
    difference of logarithms), `delta1` to `delta3` (shares of pixels with a ratio below 1.25, 1.25^2, 1.25^3) and
    `abs_rel_constant` (`abs_rel` of predicting each image's true median everywhere). Each also comes with
    `_per_image`. Then `images` and `pixels`, the numbers that counted. With `median_scaling` the names of the errors
    end in `_median_scaled`, so that they are not taken for errors of metric depth.

    Args:
        min_depth: smallest depth that counts.
        cap: largest depth that counts. None: no limit.
        crop: part of the image that counts: "garg" or "eigen" (KITTI), "nyu", or None for all.
        median_scaling: whether every prediction is first scaled to the median of its reference.
    """

    def __init__(
        self,
        min_depth: float = 1e-3,
        cap: float | None = None,
        crop: Literal["garg", "eigen", "nyu"] | None = None,
        median_scaling: bool = False,
        **kwargs: Any,
    ) -> None:
        if crop is not None and (not isinstance(crop, str) or crop not in CROPS):
            raise ValueError(f"crop must be one of {sorted(CROPS)} or None, got {crop!r}.")
        if not isinstance(median_scaling, bool):
            raise ValueError(f"median_scaling must be True or False, got {median_scaling!r}.")
        limits = (min_depth, float("inf") if cap is None else cap)
        are_numbers = all(isinstance(each, int | float | np.number) and not isinstance(each, bool) for each in limits)
        if not are_numbers or not 0 < limits[0] < limits[1]:
            raise ValueError(f"min_depth={min_depth!r} and cap={cap!r} must satisfy 0 < min_depth < cap.")
        self.min_depth, self.cap, self.crop, self.median_scaling = min_depth, cap, crop, median_scaling
        super().__init__(**kwargs)

    def _sums(self, found: Tensor, true: Tensor, **masks: Tensor) -> dict[str, dict[str, float]]:
        if true.ndim != 2:
            raise ValueError(f"Depth must have the shape (rows, columns), got {tuple(true.shape)}.")
        if unknown := set(masks) - {"mask"}:
            raise ValueError(f"DepthError takes the mask `mask`, not {sorted(unknown)}.")
        cap = float("inf") if self.cap is None else self.cap
        known = torch.isfinite(true) & (true >= self.min_depth) & (true <= cap)
        if self.crop is not None:
            known &= crop_mask(true, self.crop)
        if (mask := masks.get("mask")) is not None:
            known &= mask
        if not known.any():
            return {}
        found, true = found[known], true[known]
        if self.median_scaling:
            middle = median(found)
            if middle <= 0:
                raise ValueError(
                    f"The median of the predicted depth is {float(middle):g}, so it cannot be scaled to that of the "
                    "reference. Depth is positive: check what the model predicts."
                )
            found = found * (median(true) / middle)
        return {"all": depth_sums(found.clamp(self.min_depth, cap), true)}

    def _errors(self, images: list[dict[str, dict[str, float]]]) -> dict[str, float]:
        _check_some(images)
        every = [image["all"] for image in images]
        total = add_up(every)
        errors = depth_errors(total)
        each = [depth_errors(image) for image in every]
        errors |= {f"{key}_per_image": float(np.mean([image[key] for image in each])) for key in errors}
        if self.median_scaling:
            errors = {f"{key}_median_scaled": value for key, value in errors.items()}
        return errors | {"images": float(len(images)), "pixels": total["pixels"]}
