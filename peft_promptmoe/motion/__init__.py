# SPDX-License-Identifier: Apache-2.0
"""Optical flow and depth over frozen vision backbones: models, metrics, data, pictures."""

from .model import DepthModel, FlowModel, MotionModel, MotionOutput

__all__ = ["DepthModel", "FlowModel", "MotionModel", "MotionOutput"]
