# SPDX-License-Identifier: Apache-2.0
"""Makes the Trainer's `compute_metrics` from metrics of flow and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import EvalPrediction

from .metrics import PixelMetric


def trainer_metrics(*metrics: PixelMetric) -> Callable[..., dict[str, float]]:
    """Make the Trainer's `compute_metrics` from one metric per task, in the order of the model's labels.

    Use `TrainingArguments(batch_eval_metrics=True)`: the metrics then read batch after batch. Without it the Trainer
    keeps the predictions of the whole data set in memory, and can join images of different sizes in no array: set
    `eval_do_concat_batches=False` for those.

    Args:
        metrics: `EndPointError()` for a FlowModel, `DepthError()` for a DepthModel, both for a MotionModel, or one of
            them if the data have labels of one task only and `TrainingArguments.label_names` names those.

    Raises:
        TypeError: there are none, or others than these.
    """
    if not metrics or not all(isinstance(metric, PixelMetric) for metric in metrics):
        raise TypeError(f"trainer_metrics takes EndPointError() and DepthError(), and got {list(metrics)}.")

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        found: Any = prediction.predictions
        true: Any = prediction.label_ids
        is_apart = isinstance(found, list)  # TrainingArguments(eval_do_concat_batches=False)
        for predictions, references in zip(found, true, strict=True) if is_apart else [(found, true)]:
            _add_batches(metrics, predictions, references)
        if not compute_result:
            return {}
        results: dict[str, float] = {}
        for metric in metrics:
            results |= metric.compute()
        return results

    return compute_metrics


def _add_batches(metrics: Sequence[PixelMetric], found: Any, true: Any) -> None:
    """Add what the Trainer gives of one batch: arrays, or a tuple of them for several tasks."""
    found = found if isinstance(found, tuple) else (found,)
    true = true if isinstance(true, tuple) else (true,)
    if len(found) > len(true):  # a MotionModel predicts depth also where only flow is known
        found = tuple(each for each in found if each.ndim in {label.ndim for label in true})
    if not len(metrics) == len(found) == len(true):
        raise ValueError(
            f"{len(metrics)} metrics for {len(found)} predictions and {len(true)} labels. Give trainer_metrics "
            "one for each kind of label in the data, in the order flow, depth."
        )
    for metric, predictions, references in zip(metrics, found, true, strict=True):
        metric.add_batch(predictions=predictions, references=references)
