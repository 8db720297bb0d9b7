# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-prompt-experts tuners for Hugging Face PEFT. Importing this package registers them."""

from .engine.given_query import given_query
from .engine.model_hooks import auxiliary_loss, last_aux_losses
from .engine.prefix_export import export_prefix
from .engine.static_rows import cached_prompts
from .mept import MEPTConfig, MEPTModel
from .motion import DepthModel, FlowModel, MotionModel
from .pmoe import DispatchReport, ParameterReport, PMoEConfig, PMoEModel, parameter_report, patch_maps
from .promotion import ProMotionConfig, ProMotionModel
from .reports.assignment_callback import AssignmentCallback
from .reports.assignment_report import AssignmentReport, assignment_report
from .reports.callback import RoutingCallback
from .reports.recorder import RoutingRecorder, record_routing
from .reports.routing_report import RoutingReport, routing_report
from .reports.token_routing import TokenRouting, token_routing
from .vapt import VAPTConfig, VAPTModel
from .version import __version__

__all__ = [
    "AssignmentCallback",
    "AssignmentReport",
    "DepthModel",
    "DispatchReport",
    "FlowModel",
    "MEPTConfig",
    "MEPTModel",
    "MotionModel",
    "PMoEConfig",
    "PMoEModel",
    "ParameterReport",
    "ProMotionConfig",
    "ProMotionModel",
    "RoutingCallback",
    "RoutingRecorder",
    "RoutingReport",
    "TokenRouting",
    "VAPTConfig",
    "VAPTModel",
    "__version__",
    "assignment_report",
    "auxiliary_loss",
    "cached_prompts",
    "export_prefix",
    "given_query",
    "last_aux_losses",
    "parameter_report",
    "patch_maps",
    "record_routing",
    "routing_report",
    "token_routing",
]
