# SPDX-License-Identifier: Apache-2.0
"""MEPT, Mixture of Expert Prompt Tuning (arXiv 2509.00996)."""

from ..registration import register_tuner
from .config import MEPTConfig
from .layer import MEPTLayer
from .model import MEPTModel

__all__ = ["MEPTConfig", "MEPTLayer", "MEPTModel"]

register_tuner(MEPTConfig, MEPTModel, "MEPT")
