# SPDX-License-Identifier: Apache-2.0
"""VAPT, Visual Adaptive Prompt Tuning (arXiv 2501.18936), and VPT-Deep as one of its settings."""

from ..registration import register_tuner
from .config import VAPTConfig
from .layer import VAPTLayer
from .model import VAPTModel

__all__ = ["VAPTConfig", "VAPTLayer", "VAPTModel"]

register_tuner(VAPTConfig, VAPTModel, "VAPT")
