# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-prompt-experts tuners for Hugging Face PEFT. Importing this package registers them."""

from .callback import RoutingCallback
from .mept import MEPTConfig, MEPTModel
from .pmoe import DispatchReport, ParameterReport, PMoEConfig, PMoEModel, parameter_report, patch_maps
from .report import RoutingReport, record_routing, routing_report
from .serving import cached_prompts
from .vapt import VAPTConfig, VAPTModel

__version__ = "0.1.0"

__all__ = [
    "DispatchReport",
    "MEPTConfig",
    "MEPTModel",
    "PMoEConfig",
    "PMoEModel",
    "ParameterReport",
    "RoutingCallback",
    "RoutingReport",
    "VAPTConfig",
    "VAPTModel",
    "cached_prompts",
    "parameter_report",
    "patch_maps",
    "record_routing",
    "routing_report",
]
