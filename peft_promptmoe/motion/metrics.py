# SPDX-License-Identifier: Apache-2.0
"""Metrics of flow and depth as `evaluate.Metric`s, which need no download and keep no predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from .errors import CROPS, THRESHOLDS, add_up, crop_mask, depth_errors, depth_sums, flow_sums, known_flow, median

MAP = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))


class PixelMetric(evaluate.Metric):
    """What the metrics share: every image is read once and leaves sums, so that images may have different sizes."""

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
        """Read a batch. Arrays or tensors; masks are (B, H, W), true where a pixel counts.

        Raises:
            ValueError: shapes or numbers of images differ, or one of the two is missing.
        """
        _check_both(predictions, references)
        counts = {"predictions": predictions, "references": references}
        counts |= {name: mask for name, mask in masks.items() if mask is not None}
        if len({len(values) for values in counts.values()}) > 1:
            raise ValueError(" and ".join(f"{len(values)} {name}" for name, values in counts.items()) + ".")
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            own = {name: mask[index] for name, mask in masks.items() if mask is not None}
            self.add(prediction=prediction, reference=reference, **own)

    def add(self, *, prediction: Any = None, reference: Any = None, **masks: Any) -> None:
        """Read one image. `evaluate.combine` calls its arguments `predictions` and `references`.

        Raises:
            ValueError: shapes differ, or one of the two is missing.
        """
        prediction, reference = masks.pop("predictions", prediction), masks.pop("references", reference)
        _check_both(prediction, reference)
        found, true = _tensor(prediction).double(), _tensor(reference).double()
        if found.shape != true.shape:
            raise ValueError(
                f"A prediction of shape {tuple(found.shape)} for a reference of {tuple(true.shape)}. The models of "
                "this package predict at the size of the labels they are given."
            )
        given = {name: _tensor(mask).bool() for name, mask in masks.items() if mask is not None}
        for name, mask in given.items():
            if mask.shape != true.shape[-2:]:
                raise ValueError(f"{name} has shape {tuple(mask.shape)}, and the image {tuple(true.shape[-2:])}.")
        self._images.append(self._sums(found, true, **given))

    def compute(self, *, predictions: Any = None, references: Any = None, **masks: Any) -> dict[str, float]:
        """Errors over all that was read since the last `compute`, and over a batch given here.

        Raises:
            ValueError: nothing was read, or no pixel of it is valid.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, **masks)
        images, self._images = self._images, []
        return self._errors([image for image in images if image])

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": MAP, "references": MAP})
        return evaluate.MetricInfo(description=type(self).__doc__ or "", citation="", features=features)

    def _sums(self, found: Tensor, true: Tensor, **masks: Tensor) -> dict[str, dict[str, float]]:
        """Sums over an image's valid pixels, by group of pixels; none for an image without any."""
        raise NotImplementedError

    def _errors(self, images: list[dict[str, dict[str, float]]]) -> dict[str, float]:
        raise NotImplementedError


def _tensor(values: Any) -> Tensor:
    return values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))


def _check_both(predictions: Any, references: Any) -> None:
    if predictions is None or references is None:
        missing = "predictions" if predictions is None else "references"
        raise ValueError(f"There are no {missing}: errors are between predictions and references. Give both.")


def _check_some(images: Sequence[Any]) -> None:
    if not images:
        raise ValueError(
            "No pixel with a known reference was read. Unknown are NaN, infinite and masked pixels, for depth also "
            "what is not between min_depth and cap."
        )


class EndPointError(PixelMetric):
    """End-point error of optical flow, beside what it would be for no motion and for one motion of each image.

    Unknown pixels, which do not count, are NaN or infinite in the reference, or false in `mask`. `occluded`, where it
    is given, is true where the second frame does not show the point.

    `compute` returns

    - `epe`: mean distance to the true flow in pixels, over the valid pixels of all images; `epe_per_image`: mean of
      the images' means
    - `1px`, `3px`, `5px`: shares of pixels with an error below that
    - `f1_all`: KITTI's outliers in per cent: an error of more than 3 pixels and of more than 5 % of the true length
    - `epe_zero_flow`: of predicting no motion, a strong baseline where motions are small; `epe_constant_flow`: of the
      best one motion for each image
    - `epe_visible`, `epe_occluded`: where `occluded` was given
    - `images`, `pixels`: how many counted

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
            raise ValueError(f"Flow of shape {tuple(true.shape)}: has to be (2, rows, columns), x first.")
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
    """Errors of depth, over the valid pixels of all images and, as most published figures are, as means of images.

    Unknown pixels, which do not count, are zero, NaN or infinite in the reference, outside `min_depth` to `cap`,
    outside the crop, or false in `mask`. Predictions are brought into `min_depth` to `cap`, as is usual.

    `compute` returns `abs_rel`, `sq_rel`, `rmse`, `rmse_log`, `silog` (100 times the spread of the difference of
    logarithms), `delta1` to `delta3` (shares of pixels whose ratio is below 1.25, 1.25^2, 1.25^3),
    `abs_rel_constant` (of predicting each image's true median everywhere), each also with `_per_image`; `images` and
    `pixels`. With `median_scaling` all of them end in `_median_scaled`, so that nobody takes them for metric depth.

    Args:
        min_depth: least depth that counts.
        cap: largest one; None for no limit.
        crop: "garg" or "eigen" (KITTI), "nyu", or None.
        median_scaling: whether every prediction is scaled to its reference's median before it is compared.
    """

    def __init__(
        self,
        min_depth: float = 1e-3,
        cap: float | None = None,
        crop: Literal["garg", "eigen", "nyu"] | None = None,
        median_scaling: bool = False,
        **kwargs: Any,
    ) -> None:
        if crop is not None and crop not in CROPS:
            raise ValueError(f"crop={crop!r} has to be one of {sorted(CROPS)}, or None.")
        if not 0 < min_depth < (float("inf") if cap is None else cap):
            raise ValueError(f"min_depth={min_depth!r}, cap={cap!r}: has to be 0 < min_depth < cap.")
        self.min_depth, self.cap, self.crop, self.median_scaling = min_depth, cap, crop, median_scaling
        super().__init__(**kwargs)

    def _sums(self, found: Tensor, true: Tensor, **masks: Tensor) -> dict[str, dict[str, float]]:
        if true.ndim != 2:
            raise ValueError(f"Depth of shape {tuple(true.shape)}: has to be (rows, columns).")
        if unknown := set(masks) - {"mask"}:
            raise ValueError(f"DepthError takes the mask `mask`, not {sorted(unknown)}.")
        cap = float("inf") if self.cap is None else self.cap
        known = torch.isfinite(true) & (true >= self.min_depth) & (true <= cap)
        if self.crop is not None:
            known &= crop_mask((true.shape[0], true.shape[1]), self.crop, true.device)
        if (mask := masks.get("mask")) is not None:
            known &= mask
        if not known.any():
            return {}
        found, true = found[known], true[known]
        if self.median_scaling:
            found = found * (median(true) / median(found))
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


def trainer_metrics(*metrics: PixelMetric) -> Callable[..., dict[str, float]]:
    """The Trainer's `compute_metrics` from one metric for each task, in the order of the model's labels.

    With `TrainingArguments(batch_eval_metrics=True)` batch after batch is read; without it the Trainer keeps the
    predictions of the whole set in memory.

    Args:
        metrics: `EndPointError()` for a FlowModel, `DepthError()` for a DepthModel, both for a MotionModel.

    Raises:
        TypeError: there are none, or others than these.
    """
    if not metrics or not all(isinstance(metric, PixelMetric) for metric in metrics):
        raise TypeError(f"trainer_metrics takes EndPointError() and DepthError(), and got {list(metrics)}.")

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        found, true = prediction.predictions, prediction.label_ids
        found = found if isinstance(found, tuple) else (found,)
        true = true if isinstance(true, tuple) else (true,)
        if not len(metrics) == len(found) == len(true):
            raise ValueError(
                f"{len(metrics)} metrics for {len(found)} predictions and {len(true)} labels. Give trainer_metrics "
                "one for each task of the model, in the order flow, depth."
            )
        for metric, predictions, references in zip(metrics, found, true, strict=True):
            metric.add_batch(predictions=predictions, references=references)
        if not compute_result:
            return {}
        results: dict[str, float] = {}
        for metric in metrics:
            results |= metric.compute()
        return results

    return compute_metrics
