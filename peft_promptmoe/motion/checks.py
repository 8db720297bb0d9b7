# SPDX-License-Identifier: Apache-2.0
"""Refusals of the models for motion and depth: settings out of range, and labels of another kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def check_settings(
    tasks: Sequence[str],
    levels: Sequence[int] | Mapping[str, Sequence[int]] | None,
    channels: int,
    refinements: int | None,
    max_flow: float,
    min_depth: float,
    max_depth: float,
    task_weights: Mapping[str, float] | None,
    decoder_output: str | None,
) -> tuple[dict[str, list[int] | None], dict[str, float]]:
    """Levels and loss weights of every task.

    Raises:
        ValueError: a setting is out of range, or names a task that the model does not have.
    """
    if not _is_whole(channels) or not 1 <= channels <= 4096:
        raise ValueError(f"channels={channels!r} has to be a whole number from 1 to 4096.")
    if refinements is not None and (not _is_whole(refinements) or not 0 <= refinements <= 64):
        raise ValueError(f"refinements={refinements!r} has to be a whole number from 0 to 64, or None.")
    if not (_is_number(max_flow) and max_flow > 0):
        raise ValueError(f"max_flow={max_flow!r} has to be a positive number of pixels.")
    if not (_is_number(min_depth) and _is_number(max_depth) and 0 < min_depth < max_depth):
        raise ValueError(f"min_depth={min_depth!r}, max_depth={max_depth!r}: has to be 0 < min_depth < max_depth.")
    if decoder_output not in (None, "inverse", "depth"):
        raise ValueError(f"decoder_output={decoder_output!r} has to be 'inverse', 'depth' or None.")
    if task_weights is not None and not isinstance(task_weights, Mapping):
        raise ValueError(f"task_weights={task_weights!r} has to name its tasks: {dict.fromkeys(tasks, 1.0)}.")
    weights = dict.fromkeys(tasks, 1.0) | dict(task_weights or {})
    for task, weight in weights.items():
        if task not in tasks:
            raise ValueError(f"task_weights names {task!r}; this model has {' and '.join(tasks)}.")
        if not (_is_number(weight) and weight >= 0):
            raise ValueError(f"task_weights[{task!r}]={weight!r} has to be a number from 0.")
    return _levels(tasks, levels), weights


def _levels(
    tasks: Sequence[str], levels: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, list[int] | None]:
    asked: Mapping[str, Any] = levels if isinstance(levels, Mapping) else dict.fromkeys(tasks, levels)
    if unknown := set(asked) - set(tasks):
        raise ValueError(f"levels names {sorted(unknown)}; this model has {' and '.join(tasks)}.")
    for task, chosen in asked.items():
        if chosen is None:
            continue
        is_list = isinstance(chosen, Sequence) and not isinstance(chosen, str)
        if (
            not is_list
            or not chosen
            or not all(_is_whole(level) and level >= 0 for level in chosen)
            or len({*chosen}) < len(chosen)
        ):
            raise ValueError(
                f"levels of {task} is {chosen!r}: has to be one or more different blocks, counted from 0."
            )
    return {task: None if asked.get(task) is None else sorted(asked[task]) for task in tasks}


def _are_levels(chosen: Any) -> bool:
    if not isinstance(chosen, Sequence) or isinstance(chosen, str) or not chosen:
        return False
    return all(_is_whole(level) and level >= 0 for level in chosen) and len({*chosen}) == len(chosen)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_backbone(backbone: Any) -> None:
    """Raise TypeError where a backbone is no model, but its name, say."""
    if not isinstance(backbone, nn.Module):
        raise TypeError(
            f"The backbone is {backbone!r}, and has to be a model: AutoBackbone.from_pretrained(...) or "
            "timm.create_model(...)."
        )


def check_tensors(**inputs: Any) -> None:
    """Raise TypeError where an input is given and no tensor."""
    for name, value in inputs.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__} and has to be a tensor: torch.as_tensor(...).")


def check_frames(pixels: Tensor, next_pixels: Tensor | None, flow_labels: Tensor | None) -> None:
    """Raise ValueError where two frames are missing or do not belong together."""
    if pixels.ndim != 4:
        raise ValueError(f"pixel_values of shape {tuple(pixels.shape)}: has to be (B, channels, rows, columns).")
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values of {pixels.dtype}: has to be floating point, normalised for the backbone.")
    if next_pixels is None:
        if flow_labels is not None:
            raise ValueError("flow_labels without next_pixel_values: flow is between two frames. Give both.")
    elif next_pixels.shape != pixels.shape:
        raise ValueError(
            f"The frames have different shapes, {tuple(pixels.shape)} and {tuple(next_pixels.shape)}. Bring them to "
            "one size, and the flow with them."
        )
    elif next_pixels.dtype != pixels.dtype:
        raise ValueError(
            f"The frames have different types, {pixels.dtype} and {next_pixels.dtype}. Prepare both alike: floating "
            "point, normalised for the backbone."
        )


def check_flow(labels: Tensor | None, mask: Tensor | None, batch: int) -> None:
    """Raise ValueError where labels are no flow, or not of `batch` images."""
    _check_mask("flow", labels, mask)
    if labels is None:
        return
    if labels.ndim != 4 or labels.shape[1] != 2:
        hint = " Put the channels in front: flow.movedim(-1, 1)." if labels.ndim == 4 and labels.shape[-1] == 2 else ""
        raise ValueError(
            f"flow_labels of shape {tuple(labels.shape)}: has to be (B, 2, rows, columns), x first.{hint}"
        )
    _check_batch("flow", labels, batch)
    if not labels.is_floating_point():
        raise ValueError(f"flow_labels of {labels.dtype}: has to be pixels as floating point, decoded from the file.")


def check_depth(labels: Tensor | None, mask: Tensor | None, batch: int) -> None:
    """Raise ValueError where labels are no depth, or not of `batch` images."""
    _check_mask("depth", labels, mask)
    if labels is None:
        return
    if labels.ndim != 3:
        hint = " Take the channel away: depth.squeeze(1)." if labels.ndim == 4 and labels.shape[1] == 1 else ""
        raise ValueError(f"depth_labels of shape {tuple(labels.shape)}: has to be (B, rows, columns).{hint}")
    _check_batch("depth", labels, batch)
    if not labels.is_floating_point():
        raise ValueError(f"depth_labels of {labels.dtype}: has to be floating point, decoded from the file.")


def _check_mask(task: str, labels: Tensor | None, mask: Tensor | None) -> None:
    if mask is None:
        return
    if labels is None:
        raise ValueError(f"{task}_mask without {task}_labels masks nothing. Give both.")
    expected = (labels.shape[0], *labels.shape[-2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"{task}_mask of shape {tuple(mask.shape)}: has to be {expected}, as the labels'.")


def _check_batch(task: str, labels: Tensor, batch: int) -> None:
    if labels.shape[0] != batch:
        raise ValueError(f"{task}_labels are of {labels.shape[0]} images, and pixel_values of {batch}.")
