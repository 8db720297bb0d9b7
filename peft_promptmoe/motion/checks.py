# SPDX-License-Identifier: Apache-2.0
"""Checks of the models for flow and depth: settings in range, labels of the right shape and type."""

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
    freeze_backbone: bool,
) -> tuple[dict[str, list[int] | None], dict[str, float]]:
    """Check the settings, and return levels and loss weights of every task.

    Raises:
        ValueError: a setting is out of range, or names a task that the model does not have.
    """
    if not _is_whole(channels) or not 1 <= channels <= 4096:
        raise ValueError(f"channels must be an integer from 1 to 4096, got {channels!r}.")
    if refinements is not None and (not _is_whole(refinements) or not 0 <= refinements <= 64):
        raise ValueError(f"refinements must be an integer from 0 to 64 or None, got {refinements!r}.")
    if not (_is_number(max_flow) and max_flow > 0):
        raise ValueError(f"max_flow must be a positive number of pixels, got {max_flow!r}.")
    if not (_is_number(min_depth) and _is_number(max_depth) and 0 < min_depth < max_depth):
        raise ValueError(
            f"min_depth={min_depth!r} and max_depth={max_depth!r} must satisfy 0 < min_depth < max_depth."
        )
    if not isinstance(freeze_backbone, bool):
        raise ValueError(f"freeze_backbone must be True or False, got {freeze_backbone!r}.")
    if decoder_output not in (None, "inverse", "depth"):
        raise ValueError(f"decoder_output must be 'inverse', 'depth' or None, got {decoder_output!r}.")
    if task_weights is not None and not isinstance(task_weights, Mapping):
        raise ValueError(
            f"task_weights must be a dict from tasks to weights, such as {dict.fromkeys(tasks, 1.0)}, got "
            f"{task_weights!r}."
        )
    weights = dict.fromkeys(tasks, 1.0) | dict(task_weights or {})
    for task, weight in weights.items():
        if task not in tasks:
            raise ValueError(f"task_weights names {task!r}, but this model has the tasks {' and '.join(tasks)}.")
        if not (_is_number(weight) and weight >= 0):
            raise ValueError(f"task_weights[{task!r}] must be a number of at least 0, got {weight!r}.")
    return _levels(tasks, levels), weights


def _levels(
    tasks: Sequence[str], levels: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, list[int] | None]:
    asked: Mapping[str, Any] = levels if isinstance(levels, Mapping) else dict.fromkeys(tasks, levels)
    if unknown := set(asked) - set(tasks):
        raise ValueError(f"levels names {sorted(unknown)}, but this model has the tasks {' and '.join(tasks)}.")
    for task, chosen in asked.items():
        if chosen is None:
            continue
        if not _are_levels(chosen):
            raise ValueError(
                f"levels of {task} must list one or more different blocks, counted from 0, got {chosen!r}."
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
    """Raise TypeError if a backbone is no model, but for example its name."""
    if not isinstance(backbone, nn.Module):
        raise TypeError(
            f"The backbone must be a model, got {backbone!r}. Load it first: AutoBackbone.from_pretrained(...) or "
            "timm.create_model(...)."
        )


def check_tensors(**inputs: Any) -> None:
    """Raise TypeError if an input is given and is not a tensor."""
    for name, value in inputs.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}. Convert it: torch.as_tensor(...).")


def check_frames(pixels: Tensor, next_pixels: Tensor | None, flow_labels: Tensor | None) -> None:
    """Raise ValueError if a frame is missing, or has a wrong shape or type."""
    if pixels.ndim != 4:
        raise ValueError(f"pixel_values must have the shape (B, channels, rows, columns), got {tuple(pixels.shape)}.")
    _check_some("pixel_values", pixels)
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values must be floating point, normalised for the backbone, got {pixels.dtype}.")
    if next_pixels is None:
        if flow_labels is not None:
            raise ValueError("flow_labels need next_pixel_values: flow is between two frames. Pass both.")
    elif next_pixels.shape != pixels.shape:
        raise ValueError(
            f"pixel_values and next_pixel_values have different shapes, {tuple(pixels.shape)} and "
            f"{tuple(next_pixels.shape)}. Resize the frames to one size, and the flow with them."
        )
    elif next_pixels.dtype != pixels.dtype:
        raise ValueError(
            f"pixel_values and next_pixel_values have different types, {pixels.dtype} and {next_pixels.dtype}. "
            "Prepare both alike: floating point, normalised for the backbone."
        )


def check_flow(labels: Tensor | None, mask: Tensor | None, batch: int) -> None:
    """Raise ValueError if the labels have a wrong shape or type, or another batch size than `batch`."""
    _check_mask("flow", labels, mask)
    if labels is None:
        return
    if labels.ndim != 4 or labels.shape[1] != 2:
        hint = " Put the channels in front: flow.movedim(-1, 1)." if labels.ndim == 4 and labels.shape[-1] == 2 else ""
        raise ValueError(
            f"flow_labels must have the shape (B, 2, rows, columns), x first, got {tuple(labels.shape)}.{hint}"
        )
    _check_some("flow_labels", labels)
    _check_batch("flow", labels, batch)
    if not labels.is_floating_point():
        raise ValueError(f"flow_labels must be floating point, in pixels decoded from the file, got {labels.dtype}.")


def check_depth(labels: Tensor | None, mask: Tensor | None, batch: int) -> None:
    """Raise ValueError if the labels have a wrong shape or type, or another batch size than `batch`."""
    _check_mask("depth", labels, mask)
    if labels is None:
        return
    if labels.ndim != 3:
        hint = " Remove the channel: depth.squeeze(1)." if labels.ndim == 4 and labels.shape[1] == 1 else ""
        raise ValueError(f"depth_labels must have the shape (B, rows, columns), got {tuple(labels.shape)}.{hint}")
    _check_some("depth_labels", labels)
    _check_batch("depth", labels, batch)
    if not labels.is_floating_point():
        raise ValueError(f"depth_labels must be floating point, decoded from the file, got {labels.dtype}.")


def _check_mask(task: str, labels: Tensor | None, mask: Tensor | None) -> None:
    if mask is None:
        return
    if labels is None:
        raise ValueError(f"{task}_mask without {task}_labels has no effect. Pass both.")
    expected = (labels.shape[0], *labels.shape[-2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"{task}_mask must have the shape {expected} of its labels, got {tuple(mask.shape)}.")


def _check_some(name: str, values: Tensor) -> None:
    if values.numel() == 0:
        raise ValueError(f"{name} has the shape {tuple(values.shape)}, which holds nothing. Leave out empty batches.")


def _check_batch(task: str, labels: Tensor, batch: int) -> None:
    if labels.shape[0] != batch:
        raise ValueError(f"{task}_labels have {labels.shape[0]} images, but pixel_values have {batch}.")
