# SPDX-License-Identifier: Apache-2.0
"""Optical flow and depth on frozen vision backbones: models, metrics, data sets and pictures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..extras import extra
from .base import MotionOutput
from .model import DepthModel, FlowModel, MotionModel

if TYPE_CHECKING:
    from .data import Example, MotionDataset, TorchvisionPairs
    from .evaluation import trainer_metrics
    from .folders import find_examples
    from .metrics import DepthError, EndPointError
    from .pictures import depth_picture, error_picture, flow_legend, flow_picture

# Imported on first use: these need evaluate, torchvision or matplotlib, and the models do not.
LATER = {
    "DepthError": "metrics",
    "EndPointError": "metrics",
    "trainer_metrics": "evaluation",
    "Example": "data",
    "MotionDataset": "data",
    "TorchvisionPairs": "data",
    "find_examples": "folders",
    "depth_picture": "pictures",
    "error_picture": "pictures",
    "flow_legend": "pictures",
    "flow_picture": "pictures",
}

__all__ = [
    "DepthError",
    "DepthModel",
    "EndPointError",
    "Example",
    "FlowModel",
    "MotionDataset",
    "MotionModel",
    "MotionOutput",
    "TorchvisionPairs",
    "depth_picture",
    "error_picture",
    "find_examples",
    "flow_legend",
    "flow_picture",
    "trainer_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("motion", name):
        return getattr(import_module(f".{LATER[name]}", __name__), name)
