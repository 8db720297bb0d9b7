# SPDX-License-Identifier: Apache-2.0
"""pMoE: several frozen vision backbones exchange information through prompts (our reading of arXiv 2602.22938)."""

from ..registration import register_tuner
from ..reports.dispatch_report import DispatchReport
from .config import PMoEConfig
from .layer import PMoELayer
from .maps import patch_maps
from .model import PMoEModel
from .report import ParameterReport, parameter_report

__all__ = [
    "DispatchReport",
    "PMoEConfig",
    "PMoELayer",
    "PMoEModel",
    "ParameterReport",
    "parameter_report",
    "patch_maps",
]

register_tuner(PMoEConfig, PMoEModel, "PMOE")
