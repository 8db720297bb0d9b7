# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-prompt-experts tuners for Hugging Face PEFT. Importing this package registers them."""

from .engine.given_query import given_query
from .engine.static_rows import cached_prompts
from .mept import MEPTConfig, MEPTModel
from .pmoe import DispatchReport, ParameterReport, PMoEConfig, PMoEModel, parameter_report, patch_maps
from .reports.callback import RoutingCallback
from .reports.recorder import record_routing
from .reports.routing_report import RoutingReport, routing_report
from .vapt import VAPTConfig, VAPTModel
from .version import __version__

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
    "__version__",
    "cached_prompts",
    "given_query",
    "parameter_report",
    "patch_maps",
    "record_routing",
    "routing_report",
]
