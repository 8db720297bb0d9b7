# SPDX-License-Identifier: Apache-2.0
"""ProMotion (experimental), our reading of arXiv 2406.04999 as an adapter: denoised prototypes for flow and depth."""

from ..registration import register_tuner
from .config import ProMotionConfig
from .layer import ProMotionLayer
from .model import ProMotionModel

__all__ = ["ProMotionConfig", "ProMotionLayer", "ProMotionModel"]

register_tuner(ProMotionConfig, ProMotionModel, "PROMOTION")
